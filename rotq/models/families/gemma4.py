"""Gemma 4, text model: norms behind the branches, head widths by layer, norms on values.

What is added to the stream is norm(y) diag(g), as in Gemma 2, and R^T diag(g) R is no diagonal
matrix: R1 cannot be fused. Variants with inputs per layer (E2B, E4B) are refused altogether: those
inputs are made from the tokens, and their last blocks read keys and values that earlier ones hand
on, so that a block is no function of its hidden states. So are Gemma 3n's, which pass on four
streams (AltUp) besides.
"""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="Gemma 4",
    architectures=("Gemma4ForCausalLM",),
    residual_rotation=False,
    readers={},
    stream_writers="",
)
