"""Qwen3-Next and Qwen3.5: gated delta-net layers among those with attention; gains are 1 + w.

Of a linear-attention layer the projections are rotated and quantized. What lies between them, the
short convolution, decay and state, is left alone: it follows the projections' outputs, which R1
does not touch. Attention's output gate is rows of q_proj.
"""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="Qwen3.5",
    architectures=(
        "Qwen3NextForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5MoeForCausalLM",
    ),
    norm_offset=1.0,
    readers={
        "input_layernorm": r"self_attn\.[qkv]_proj|linear_attn\.in_proj_\w+",
        "post_attention_layernorm": (
            r"mlp\.((experts\.\d+\.|shared_expert\.)?(gate|up)_proj|gate|shared_expert_gate)"
        ),
    },
    stream_writers=(
        r"self_attn\.o_proj|linear_attn\.out_proj"
        r"|mlp\.(experts\.\d+\.|shared_expert\.)?down_proj"
    ),
)
