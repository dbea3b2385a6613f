"""Llama and the families built exactly like it: SmolLM2, TinyLlama, Mistral, SmolLM3, Granite.

Biases (``attention_bias``, ``mlp_bias``), grouped KV heads, a head size of its own, sliding
windows, layers without RoPE (SmolLM3) and the order in which RoPE pairs features need no field:
linears are asked for their bias, the rest is the model's forward. Granite's multipliers are
scalars, and scalars commute with rotations.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Llama",
    architectures=(
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "MinistralForCausalLM",
        "Ministral3ForCausalLM",
        "SmolLM3ForCausalLM",
        "GraniteForCausalLM",
        "SeedOssForCausalLM",
        "HeliumForCausalLM",
        "Ernie4_5ForCausalLM",
        "CwmForCausalLM",
    ),
)
