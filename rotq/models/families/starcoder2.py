"""StarCoder 2: LayerNorms, biases, an MLP without gate."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="StarCoder 2",
    architectures=("Starcoder2ForCausalLM",),
    layer_norm=True,
    mlp_inputs=("c_fc",),
    mlp_up="",
    mlp_output="c_proj",
)
