"""Trellis codes of weights: what a path stands for, and the search for the best one."""
