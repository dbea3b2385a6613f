"""Arcee (AFM): Llama with squared ReLU in the place of a gate."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Arcee",
    architectures=("ArceeForCausalLM",),
    mlp_inputs=("up_proj",),
    mlp_up="",
)
