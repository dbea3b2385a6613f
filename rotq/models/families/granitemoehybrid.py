"""Granite 4: Mamba 2 and attention in turn, experts and a shared MLP side by side."""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="Granite-MoE-Hybrid",
    architectures=("GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM"),
    readers={
        "input_layernorm": r"self_attn\.[qkv]_proj|mamba\.in_proj",
        "post_attention_layernorm": (
            r"block_sparse_moe\.(experts\.\d+\.(gate|up)_proj|router)|shared_mlp\.input_linear"
        ),
    },
    stream_writers=(
        r"self_attn\.o_proj|mamba\.out_proj"
        r"|block_sparse_moe\.experts\.\d+\.down_proj|shared_mlp\.output_linear"
    ),
)
