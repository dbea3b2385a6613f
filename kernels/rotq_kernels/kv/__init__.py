"""Packed KV cache: tokens into pages, and attention to what is in them."""
