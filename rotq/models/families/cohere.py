"""Cohere (Command R) and Cohere 2: attention and MLP side by side behind one LayerNorm.

The norm has no bias; logits are multiplied by a scalar.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Cohere",
    architectures=("CohereForCausalLM", "Cohere2ForCausalLM"),
    layer_norm=True,
    mlp_norm="input_layernorm",
)
