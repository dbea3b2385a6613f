"""What quantization cost: perplexity, divergence from the original, agreement."""
