"""Mixtral: Llama's attention, and experts w1 (gate), w3 (up), w2 (down) on disk."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Mixtral",
    architectures=("MixtralForCausalLM",),
    experts="mlp.experts",
    router="mlp.gate",
    renames=(
        (r"\.block_sparse_moe\.gate\.", ".mlp.gate."),
        (r"\.block_sparse_moe\.experts\.(\d+)\.w1\.", r".mlp.experts.\1.gate_proj."),
        (r"\.block_sparse_moe\.experts\.(\d+)\.w2\.", r".mlp.experts.\1.down_proj."),
        (r"\.block_sparse_moe\.experts\.(\d+)\.w3\.", r".mlp.experts.\1.up_proj."),
    ),
)
