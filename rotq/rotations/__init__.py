"""Orthogonal changes of basis and factors: functions of tensors only."""
