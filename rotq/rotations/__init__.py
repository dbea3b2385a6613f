"""Orthogonal changes of basis and how they are fused into weights."""
