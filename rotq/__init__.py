"""rotq: rotate, quantize and serve language models and protein language models.

Importing it makes transformers load rotq checkpoints, and imports neither torch nor transformers.
"""

from rotq.checkpoint.registration import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
