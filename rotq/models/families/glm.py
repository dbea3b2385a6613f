"""GLM: Llama with gate and up as rows of one layer."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="GLM",
    architectures=("GlmForCausalLM",),
    mlp_inputs=("gate_up_proj",),
    mlp_up="",
)
