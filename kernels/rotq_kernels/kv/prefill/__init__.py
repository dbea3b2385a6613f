"""Attention of many tokens to packed pages."""
