"""Mixtral: Llama's attention, and experts that its files call w1 (gate), w3 (up) and w2 (down)."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Mixtral",
    architectures=("MixtralForCausalLM",),
    experts="mlp.experts",
    router="mlp.gate",
)
