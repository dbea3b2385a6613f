"""Calibration: token windows, streams of activations, captured layer inputs, token importance."""
