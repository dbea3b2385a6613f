"""Phi-3 and Phi-4: q, k and v are rows of one layer, gate and up of another."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Phi-3",
    architectures=("Phi3ForCausalLM",),
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    mlp_inputs=("gate_up_proj",),
    mlp_up="",
)
