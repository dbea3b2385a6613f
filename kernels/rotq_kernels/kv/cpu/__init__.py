"""Attention to packed pages on a CPU."""
