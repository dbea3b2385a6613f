"""Modules that take the place of a linear layer or stand in front of attention heads."""
