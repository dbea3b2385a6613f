"""Hunyuan, dense: Llama with norms on the heads of q and k behind RoPE."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Hunyuan",
    architectures=("HunYuanDenseV1ForCausalLM",),
    query_norm="self_attn.query_layernorm",
    key_norm="self_attn.key_layernorm",
)
