"""``python -m rotq_kernels.compile_check.check``: every kernel compiled ahead of time."""
