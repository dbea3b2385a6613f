"""Packed layouts and kernels of rotq; knows nothing of models or files."""
