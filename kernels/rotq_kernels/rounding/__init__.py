"""The inner loops of rounding weights to a grid, in native code for CPUs."""
