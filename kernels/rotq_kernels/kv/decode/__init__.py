"""Attention of new tokens to packed pages."""
