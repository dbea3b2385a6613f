"""Transforms found by optimization: parameters, student, teacher, training, choice."""
