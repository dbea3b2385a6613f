"""OLMo 2 and OLMo 3: branches read the stream as it is, and a norm with a gain follows each.

As for Gemma 2, norm(y) diag(g) is added to the stream and R^T diag(g) R is no diagonal matrix: R1
cannot be fused. Norms over all of q and k lie behind the projections, R2 and R4 inside the
branches.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="OLMo 2",
    architectures=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    attention_norm="",
    mlp_norm="",
    residual_rotation=False,
)
