"""Attention of transformers' models, extended, watched or replaced by what is known."""
