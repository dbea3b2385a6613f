"""Gemma 1 and VaultGemma: Llama with gains stored as w where 1 + w is meant.

The embedding is multiplied by sqrt(D), a scalar. Unlike Gemma 2 and later no norm follows a branch.
"""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="Gemma",
    architectures=("GemmaForCausalLM",),
    norm_offset=1.0,
)
