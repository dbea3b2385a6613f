"""The disk: which paths rotq may touch, and files that are whole or absent."""
