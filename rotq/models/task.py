"""What a checkpoint predicts: the next token, or masked ones."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)


def architectures(config: Any) -> list[str]:
    """Class names of a configuration: its own, or else the language model of its model type.

    A type that has both heads, as BERT, is masked unless the configuration is a decoder's.
    """
    named = getattr(config, "architectures", None)
    names = [n for n in named if isinstance(n, str)] if isinstance(named, list | tuple) else []
    if names:
        return names
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type)
    if causal and masked:
        return [masked if getattr(config, "is_decoder", None) is False else causal]
    return [name for name in (causal, masked) if name]


def is_masked(config: Any) -> bool:
    """Whether the model fills in masked tokens and sees both sides of each."""
    return any(name.endswith("ForMaskedLM") for name in architectures(config))


def auto_class(config: Any) -> Any:
    """transformers' auto class for the configuration's head."""
    return AutoModelForMaskedLM if is_masked(config) else AutoModelForCausalLM
