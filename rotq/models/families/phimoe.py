"""Phi-3.5-MoE: LayerNorms, experts in every block."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Phi-MoE",
    architectures=("PhimoeForCausalLM",),
    layer_norm=True,
    experts="mlp.experts",
    router="mlp.router",
)
