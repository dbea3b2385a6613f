"""VaultGemma: Gemma 2 without the norms behind the branches, which makes R1 possible."""

from rotq.models.adapter import Adapter

ADAPTER = Adapter(
    family="VaultGemma",
    architectures=("VaultGemmaForCausalLM",),
    mlp_norm="pre_feedforward_layernorm",
    norm_offset=1.0,
)
