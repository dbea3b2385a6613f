"""MiniMax-M2: norms over all of q and k, experts in every block."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="MiniMax-M2",
    architectures=("MiniMaxM2ForCausalLM",),
    experts="mlp.experts",
    router="mlp.gate",
)
