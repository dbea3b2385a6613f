"""EXAONE 4: norms behind the branches only, as OLMo 2 (R1 is impossible for the same reason)."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="EXAONE 4",
    architectures=("Exaone4ForCausalLM",),
    attention_norm="",
    mlp_norm="",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    residual_rotation=False,
)
