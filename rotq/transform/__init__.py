"""Transforms found by optimization: parameters, fake-quantized student, teacher, training, choice."""
