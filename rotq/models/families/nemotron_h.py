"""Nemotron-H: each block is one branch, Mamba 2, attention, an MLP or experts, behind one norm."""

from rotq.models.generic import StreamAdapter

ADAPTER = StreamAdapter(
    family="Nemotron-H",
    architectures=("NemotronHForCausalLM",),
    final_norm="model.norm_f",
    readers={
        "norm": (
            r"mixer\.(in_proj|[qkv]_proj|up_proj|gate"
            r"|(experts\.\d+|shared_experts)\.(gate|up)_proj)"
        )
    },
    stream_writers=(r"mixer\.(out_proj|o_proj|down_proj|(experts\.\d+|shared_experts)\.down_proj)"),
)
