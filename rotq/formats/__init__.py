"""What a quantized number can be: grids, codes, scales, and their cost in bits."""
