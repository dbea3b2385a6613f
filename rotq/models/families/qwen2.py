"""Qwen2 and Qwen2.5, also as the text part of their VL models: Llama with biases on q, k and v."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Qwen2",
    architectures=(
        "Qwen2ForCausalLM",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
    ),
)
