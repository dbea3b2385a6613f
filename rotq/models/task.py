"""What a checkpoint predicts: the next token, of text alone or beside images, or masked ones."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


def architectures(config: Any) -> list[str]:
    """Class names of a configuration: its own, or else the language model of its model type.

    A type that has both heads, as BERT, is masked unless the configuration is a decoder's. One
    with a text part and others is the class that has all of them.
    """
    named = getattr(config, "architectures", None)
    names = [n for n in named if isinstance(n, str)] if isinstance(named, list | tuple) else []
    if names:
        return names
    whole = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    if whole and _has_parts(config):
        return [whole]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    masked = MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type)
    if causal and masked:
        return [masked if getattr(config, "is_decoder", None) is False else causal]
    return [name for name in (causal, masked) if name]


def is_masked(config: Any) -> bool:
    """Whether the model fills in masked tokens and sees both sides of each."""
    return any(name.endswith("ForMaskedLM") for name in architectures(config))


def is_multimodal(config: Any) -> bool:
    """Whether a text decoder is a part of the model, beside towers for images or sounds."""
    known = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    return known in architectures(config) and _has_parts(config)


def text_config(config: Any) -> Any:
    """The configuration of the text decoder; the whole one where there are no other parts."""
    return config.get_text_config(decoder=True) if is_multimodal(config) else config


def auto_class(config: Any) -> Any:
    """transformers' auto class for the configuration's head."""
    if is_masked(config):
        return AutoModelForMaskedLM
    if not is_multimodal(config):
        return AutoModelForCausalLM
    sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if sees else AutoModelForMultimodalLM


def _has_parts(config: Any) -> bool:
    """Also where no tower is configured, the text part has a configuration of its own."""
    return config.get_text_config(decoder=True) is not config
