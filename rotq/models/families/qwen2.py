"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(family="Qwen2", architectures=("Qwen2ForCausalLM",))
