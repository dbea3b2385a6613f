"""The packed cache of transformers' ``generate``."""
