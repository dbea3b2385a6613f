"""LFM2, dense and with experts: short convolutions and attention in turn."""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="LFM2",
    architectures=("Lfm2ForCausalLM", "Lfm2MoeForCausalLM"),
    final_norm="model.embedding_norm",
    readers={
        "operator_norm": r"self_attn\.[qkv]_proj|conv\.in_proj",
        "ffn_norm": r"feed_forward\.(w1|w3|gate|experts\.\d+\.(gate|up)_proj)",
    },
    stream_writers=(
        r"self_attn\.out_proj|conv\.out_proj|feed_forward\.(w2|experts\.\d+\.down_proj)"
    ),
)
