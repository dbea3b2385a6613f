"""A tiny random model of every causal family of transformers that can be made from a small config.

A family is a ``model_type``. ``SHARED`` has sizes under all the names that configurations use for
them; a family gets those that its configuration knows, and what ``CHANGES`` says of it.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 258
"""A token for each byte, and two more."""

SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_head_dim": 24,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": 96,
    "n_ctx": 256,
    "d_model": 64,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "embedding_size": 64,
    "ffn_dim": 96,
    "n_layers": 2,
    "n_heads": 4,
    "num_layers": 2,
    "num_heads": 4,
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "is_decoder": True,
    "state_size": 16,
}

LEFT_OUT = object()
"""In place of a value: the configuration's own default."""

_MLA = {"head_dim": 8, "num_key_value_heads": 4}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA_NET = {
    **_HYBRID,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_PART = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_BLT_PART = {
    **_PART,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_size_global": 64,
    "encoder_cross_output_size": None,
}
_ROTARY_HALF = {"rotary_dim": 8}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {"1": {"head_dim": 32}},
    "hidden_size_per_layer_input": 0,
}
_INPUTS_PER_LAYER = {
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
}

CHANGES: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": {**_MLA, **_HYBRID, "linear_head_dim": 16, "linear_num_heads": 4},
    "bamba": {"layers_block_type": LEFT_OUT, "attn_layer_indices": [1]},
    "blt": {
        **{f"{part}_config": _BLT_PART for part in ("patcher", "encoder", "decoder", "global")},
        "encoder_hash_byte_group_vocab": 64,
    },
    "codegen": _ROTARY_HALF,
    "dbrx": {
        "num_key_value_heads": LEFT_OUT,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon": {"head_dim": LEFT_OUT, "num_kv_heads": 4, "ffn_hidden_size": 96},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "intermediate_size": [96, 96],
        "activation_sparsity_pattern": [0.0, 0.0],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
    },
    "gemma4": _INPUTS_PER_LAYER,
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "glm4_moe_lite": {**_MLA, "num_key_value_heads": 4},
    "glm_moe_dsa": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": _ROTARY_HALF,
    "granitemoehybrid": {**_HYBRID, "shared_intermediate_size": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "kimi_linear": {
        **_MLA,
        **_HYBRID,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": _MLA,
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "minicpm3": _MLA,
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
    },
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "phi4_multimodal": {
        "vision_config": {**_PART, "num_hidden_layers": 3, "image_size": 56, "crop_size": 56},
        "audio_config": {
            **_PART,
            "num_blocks": 1,
            "ext_pw_out_channel": 64,
            "depthwise_separable_out_channel": 64,
            "nemo_conv_channels": 16,
        },
    },
    "qwen3_5_moe_text": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_next": _DELTA_NET,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [16, 16],
        "attn_layers": ["local", "local"],
    },
    "xlstm": {
        "v_head_dim": LEFT_OUT,
        "qk_head_dim": LEFT_OUT,
        "embedding_dim": 64,
        "num_blocks": 2,
    },
    "youtu": _MLA,
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_dt_rank": 8,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "chunk_size": 16,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid"]},
}
"""By model type; the text part's of those that have parts."""

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every causal family of transformers."""


def tiny_family_config(model_type: str) -> Any:
    """The configuration; of a family in parts its text model's.

    Raises:
        Exception: whatever transformers raises where the sizes do not fit the family.
    """
    text = CONFIG_MAPPING[model_type]().get_text_config(decoder=True)
    return type(text)(**fitting(text, CHANGES.get(model_type, {})))


def fitting(text: Any, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The sizes of ``SHARED`` that a text configuration knows, with what its type needs besides.

    Args:
        changes: These as well.
    """
    # it is thrown away, so that what differs between layers may be read from the whole
    text.__dict__["allow_global_per_layer_attribute_access"] = True
    known = {key: value for key, value in SHARED.items() if _is_set(text, key)}
    known |= CHANGES.get(text.model_type, {}) | (changes or {})
    aliases = type(text).attribute_map
    return {
        key: value
        for key, value in known.items()
        if value is not LEFT_OUT and (key not in aliases or aliases[key] not in known)
    }


def tiny_family(model_type: str, *, seed: int = 0) -> Any:
    """A random causal model, fp32, in eval mode; weights are larger than an initialisation's.

    Raises:
        Exception: whatever transformers raises where the family cannot be made so small.
    """
    config = tiny_family_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            _randomize(name, parameter)
    return model.eval().requires_grad_(False)


def _randomize(name: str, parameter: torch.nn.Parameter) -> None:
    """Matrices larger than an initialisation's; gains that are not ones, biases not zeros."""
    if parameter.ndim > 1 and "norm" not in name and "conv" not in name:
        torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    elif parameter.ndim == 1 and name.endswith((".weight", ".bias")):
        parameter.data += torch.empty_like(parameter).uniform_(-0.4, 0.4)


def byte_tokenizer() -> Any:
    """A token for each byte; 0 pads, 1 ends."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<end>": 1} | {letter: 2 + i for i, letter in enumerate(letters)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>"
    )


def _is_set(config: Any, key: str) -> bool:
    return hasattr(config, key) and (getattr(config, key) is not None or key == "head_dim")
