"""Llama 4, text model: experts and a shared one in some blocks, layers without RoPE in between.

The norm on the heads of q and k has no gain; the temperature of long contexts is a scalar.
"""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="Llama 4",
    architectures=("Llama4ForCausalLM",),
    readers={
        "input_layernorm": r"self_attn\.[qkv]_proj",
        "post_attention_layernorm": (
            r"feed_forward\.((experts\.\d+\.|shared_expert\.)?(gate|up)_proj|router)"
        ),
    },
    stream_writers=(r"self_attn\.o_proj|feed_forward\.(experts\.\d+\.|shared_expert\.)?down_proj"),
)
