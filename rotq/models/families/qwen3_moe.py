"""Qwen3-MoE: Qwen3's attention; some blocks may have a plain MLP (``mlp_only_layers``)."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Qwen3-MoE",
    architectures=("Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration"),
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    experts="mlp.experts",
    router="mlp.gate",
)
