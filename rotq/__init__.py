"""rotq: rotate, quantize and serve language models and protein language models."""

__version__ = "0.1.0"
