"""Qwen2-MoE: Qwen2's attention, experts and a shared one whose output is gated."""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="Qwen2-MoE",
    architectures=("Qwen2MoeForCausalLM",),
    readers={
        "input_layernorm": r"self_attn\.[qkv]_proj",
        "post_attention_layernorm": (
            r"mlp\.((experts\.\d+\.|shared_expert\.)?(gate|up)_proj|gate|shared_expert_gate)"
        ),
    },
    stream_writers=r"self_attn\.o_proj|mlp\.(experts\.\d+\.|shared_expert\.)?down_proj",
)
