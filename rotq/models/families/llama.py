"""Llama and the families built exactly like it: SmolLM2, TinyLlama, Mistral.

Biases (``attention_bias``, ``mlp_bias``), grouped KV heads, a head size of its own and Mistral's
sliding window need no field: linears are asked for their bias, the rest is the model's forward.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(family="Llama", architectures=("LlamaForCausalLM", "MistralForCausalLM"))
