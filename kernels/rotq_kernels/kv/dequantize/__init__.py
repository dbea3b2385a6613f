"""Packed keys and values as whole ones again, for chunks that are worth it."""
