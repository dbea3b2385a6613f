"""Persimmon: LayerNorms, biases, squared ReLU; q, k and v are rows of one layer, head by head."""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="Persimmon",
    architectures=("PersimmonForCausalLM",),
    final_norm="model.final_layernorm",
    layer_norm=True,
    readers={
        "input_layernorm": r"self_attn\.query_key_value",
        "post_attention_layernorm": r"mlp\.dense_h_to_4h",
    },
    stream_writers=r"self_attn\.dense|mlp\.dense_4h_to_h",
)
