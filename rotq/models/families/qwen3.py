"""Qwen3: Llama with RMSNorms on the heads of q and k.

The norms sit behind the projections' outputs, which no fused rotation touches (R1 acts on inputs,
R2 on v); their gains stay where they are.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3VLForConditionalGeneration"),
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
)
