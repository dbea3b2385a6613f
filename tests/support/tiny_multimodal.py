"""Tiny random models of several parts, as transformers' own classes, and images for them.

The text part has the sizes of ``tiny_families``, the others those of ``BESIDE`` under all the names
that configurations use for them; ``CHANGES`` and ``TEXT_CHANGES`` say what a class needs besides.
"""

from __future__ import annotations

import inspect
from typing import Any

import tiny_families
import torch
import transformers
from accelerate import init_empty_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from rotq.models.task import is_multimodal

CLASSES = {name: kind for kind, name in reversed(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items())}
"""Every class with a text decoder beside other parts that transformers lists, to a model type."""

BESIDE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "num_layers": 2,
    "depth": 2,
    "embed_dim": 32,
    "head_dim": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "image_size": 28,
    "patch_size": 7,
    "in_channels": 3,
    "out_hidden_size": 64,
    "projection_dim": 64,
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "text_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    "vocab_size": 64,
}

_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_OTHER_TOKENS = ("vision_start_token_id", "vision_end_token_id", "boi_token_id", "eoi_token_id")
IMAGE_TOKEN = 240

MOST_PARAMETERS = 10**8
"""Of what is called tiny here: some parts have sizes by names that ``BESIDE`` does not know."""

_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 3, 3],
        "partial_rotary_factor": 1.0,
    }
}
TEXT_CHANGES: dict[str, dict[str, Any]] = dict.fromkeys(
    (
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "glm46v"),
        *("cosmos3_edge", "glm_ocr", "paddleocr_vl", "qwen2_5_omni_thinker"),
    ),
    _MROPE,
) | {
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
    "step3p7": {"sliding_window": 16},
    "ernie4_5_vl_moe": {**_MROPE, "moe_intermediate_size": [32, 32]},
}
_SOUND = {"num_filters": 4, "depths": [1] * 7}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2_vl": {"vision_config": {"hidden_size": 64}},
    "gemma3": {"": {"mm_tokens_per_image": 4}},
    "llama4": {"vision_config": {"pixel_shuffle_ratio": 0.5, "intermediate_size": 128}},
    "llava_onevision": {"": {"image_grid_pinpoints": [[28, 28]]}},
    "paligemma": {"": {"projection_dim": 64}},
    "cohere2_vision": {"": {"alignment_intermediate_size": 64}},
    "idefics3": {"": {"scale_factor": 2}},
    "smolvlm": {"": {"scale_factor": 2}},
    "vipllava": {"": {"vision_feature_layer": [-1, -2]}},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "molmo2": {
        "vision_config": {"image_size": [28, 28]},
        "adapter_config": {"vision_feature_layer": [1, 0]},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "llava_next": {"": {"image_grid_pinpoints": [[28, 28]]}},
    "vibevoice_asr": {
        "semantic_tokenizer_encoder_config": _SOUND,
        "acoustic_tokenizer_encoder_config": _SOUND,
    },
}
"""Of the part of that name; "" is the whole."""


def tiny_multimodal_config(model_type: str) -> Any:
    """The whole configuration.

    Raises:
        Exception: whatever transformers raises where the sizes do not fit.
    """
    kind = CONFIG_MAPPING[model_type]
    whole, changes = kind(), CHANGES.get(model_type, {})
    text = whole.get_text_config(decoder=True)
    parts = {}
    for name in kind.sub_configs:
        part = getattr(whole, name, None)
        if part is text:
            sizes = tiny_families.fitting(text) | TEXT_CHANGES.get(model_type, {})
            parts[name] = type(part)(**sizes)
        elif part is not None:
            known = {key: value for key, value in BESIDE.items() if hasattr(part, key)}
            parts[name] = type(part)(**known | changes.get(name, {}))
    tokens = {name: IMAGE_TOKEN + i // 2 for i, name in enumerate(_TOKENS)}
    tokens |= {name: IMAGE_TOKEN + 4 + i for i, name in enumerate(_OTHER_TOKENS)}
    known = {name: token for name, token in tokens.items() if hasattr(whole, name)}
    return kind(**parts, **known, **changes.get("", {}))


def tiny_multimodal(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random model of transformers' own class, fp32, in eval mode.

    Args:
        changes: Of the whole configuration.

    Raises:
        ValueError: it has no text part beside others, or more than ``MOST_PARAMETERS``.
    """
    config = tiny_multimodal_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    auto = transformers.AutoModelForMultimodalLM
    _check_size(auto, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            tiny_families._randomize(name, parameter)
            if name.endswith("newline"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model.eval().requires_grad_(False)


def _check_size(auto: Any, config: Any) -> None:
    """Before its memory is asked for."""
    if not is_multimodal(config):
        raise ValueError("its text model is a family of its own, or it is none")
    with init_empty_weights(include_buffers=True):
        size = auto.from_config(config, dtype=torch.float32).num_parameters()
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters in parts of sizes not known here")


def image_inputs(model: Any) -> dict[str, torch.Tensor]:
    """An image between words, as the model's processor would give it; fp32."""
    pixels = _pixels(model)
    features = model.get_image_features(**pixels)
    rows = getattr(features, "pooler_output", features)
    rows = features.last_hidden_state if rows is None else rows
    rows = torch.cat(list(rows)) if isinstance(rows, list | tuple) else rows
    number = rows.shape[:-1].numel()
    ids_T = [5, 9, 13, *[IMAGE_TOKEN] * number, 7, 11, 6, 50, 31]
    ids_BT = torch.tensor([ids_T])
    inputs = {"input_ids": ids_BT, **pixels}
    is_image_BT = (ids_BT == IMAGE_TOKEN).int()
    if "mm_token_type_ids" in _arguments(model):
        inputs["mm_token_type_ids"] = is_image_BT
    if model.config.model_type == "gemma3":
        inputs["token_type_ids"] = is_image_BT
    return inputs


def _pixels(model: Any) -> dict[str, torch.Tensor]:
    generator, arguments = torch.Generator().manual_seed(3), _arguments(model)
    vision = model.config.vision_config
    if "image_grid_thw" in arguments:
        features = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(16, features, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    image = torch.randn(1, 3, 28, 28, generator=generator)
    if "pixel_attention_mask" in arguments and "spatial_shapes" not in arguments:
        return {"pixel_values": image[None]}
    if "image_sizes" in arguments and model.config.model_type != "llava":
        if model.config.model_type.startswith("llava"):
            image = torch.stack((image, image.flip(-1)), dim=1)
        return {"pixel_values": image, "image_sizes": torch.tensor([[28, 28]])}
    if "spatial_shapes" in arguments:
        patches = torch.randn(1, 16, 3 * vision.patch_size**2, generator=generator)
        mask, shapes = torch.ones(1, 16, dtype=torch.int64), torch.tensor([[4, 4]])
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return {"pixel_values": image}


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
