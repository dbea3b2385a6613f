"""``python -m rotq_kernels.compile_check``: every kernel compiled ahead of time."""
