"""Bases put into a model: what multiplies which weight, and the fused result."""
