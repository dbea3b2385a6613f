"""GLM-4.5 to 4.7, dots.llm1, ERNIE 4.5 MoE: attention as Llama's, experts and shared ones.

Unlike GLM-4 no norm follows a branch. Some blocks have a plain MLP.
"""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="GLM-4-MoE",
    architectures=(
        "Glm4MoeForCausalLM",
        "Glm4vMoeForConditionalGeneration",
        "Dots1ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
    ),
    readers={
        "input_layernorm": r"self_attn\.[qkv]_proj",
        "post_attention_layernorm": (
            r"mlp\.((experts\.\d+\.|shared_experts\.)?(gate|up)_proj|gate)"
        ),
    },
    stream_writers=r"self_attn\.o_proj|mlp\.(experts\.\d+\.|shared_experts\.)?down_proj",
)
