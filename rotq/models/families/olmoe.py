"""OLMoE: norms over all of q and k, experts in every block."""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="OLMoE",
    architectures=("OlmoeForCausalLM",),
    readers={
        "input_layernorm": r"self_attn\.[qkv]_proj",
        "post_attention_layernorm": r"mlp\.(experts\.\d+\.(gate|up)_proj|gate)",
    },
    stream_writers=r"self_attn\.o_proj|mlp\.experts\.\d+\.down_proj",
)
