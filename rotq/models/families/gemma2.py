"""Gemma 2: norms before and after each branch, gains stored as w with 1 + w meant.

What a branch adds to the stream is norm(y) diag(g). In R1's basis that is norm(y R) R^T diag(g) R,
and R^T diag(g) R is no diagonal matrix, so that no gain can express it: R1 cannot be fused. R2 and
R4 lie inside the branches.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Gemma 2",
    architectures=("Gemma2ForCausalLM",),
    mlp_norm="pre_feedforward_layernorm",
    norm_offset=1.0,
    residual_rotation=False,
)
