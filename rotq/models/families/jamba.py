"""Jamba, Bamba and Falcon-H1: Mamba and attention in turn or side by side, MLP or experts.

Falcon-H1's multipliers are scalars, or factors on what in_proj writes.
"""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="Jamba",
    architectures=("JambaForCausalLM", "BambaForCausalLM", "FalconH1ForCausalLM"),
    final_norm="model.final_layernorm",
    readers={
        "input_layernorm": r"self_attn\.[qkv]_proj|mamba\.in_proj",
        "pre_ff_layernorm": r"feed_forward\.((experts\.\d+\.)?(gate|up)_proj|router)",
    },
    stream_writers=(r"self_attn\.o_proj|mamba\.out_proj|feed_forward\.(experts\.\d+\.)?down_proj"),
)
