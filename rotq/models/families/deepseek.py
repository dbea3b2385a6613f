"""DeepSeek V2 and V3 and what has their blocks: latent attention, experts and shared ones.

Latent attention (MLA) reads the stream by q_a_proj (q_proj where queries are not compressed) and
kv_a_proj_with_mqa only. What follows has norms of its own, inside the branch.
"""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="DeepSeek",
    architectures=(
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "YoutuForCausalLM",
    ),
    readers={
        "input_layernorm": r"self_attn\.(q_proj|q_a_proj|kv_a_proj_with_mqa)",
        "post_attention_layernorm": (
            r"mlp\.((experts\.\d+\.|shared_experts\.)?(gate|up)_proj|gate)"
        ),
    },
    stream_writers=r"self_attn\.o_proj|mlp\.(experts\.\d+\.|shared_experts\.)?down_proj",
)
