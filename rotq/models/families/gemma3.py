"""Gemma 3, text model: norms before and after each branch, gains stored as w with 1 + w meant.

The norm behind o_proj and down_proj applies its gain before the sum with the residual stream. A
gain does not commute with a rotation, so R1 cannot be fused; R2 and R4 lie inside the branches.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Gemma 3",
    architectures=("Gemma3ForCausalLM",),
    mlp_norm="pre_feedforward_layernorm",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    norm_offset=1.0,
    residual_rotation=False,
)
