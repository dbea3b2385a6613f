"""Nemotron (Minitron): LayerNorms whose gain is 1 + w, squared ReLU, no gate."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Nemotron",
    architectures=("NemotronForCausalLM",),
    layer_norm=True,
    norm_offset=1.0,
    mlp_inputs=("up_proj",),
    mlp_up="",
)
