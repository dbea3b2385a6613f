"""Apertus: norms on the heads of q and k, xIELU in the place of a gate."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Apertus",
    architectures=("ApertusForCausalLM",),
    attention_norm="attention_layernorm",
    mlp_norm="feedforward_layernorm",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    mlp_inputs=("up_proj",),
    mlp_up="",
)
