"""Granite-MoE: Granite with experts in every block."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Granite-MoE",
    architectures=("GraniteMoeForCausalLM",),
    mlp="block_sparse_moe",
    experts="block_sparse_moe.experts",
    router="block_sparse_moe.router",
)
