"""Random models of every family, small enough to run in fp64 in milliseconds.

Weights are larger than an initialisation's, norm gains are not ones and biases are not zeros:
code that forgets a gain or a bias is right on a freshly initialised model.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 97

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_MOE = {"num_experts_per_tok": 2}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_ESM = {
    **_ENCODER,
    "mask_token_id": 32,
    "position_embedding_type": "rotary",
    "token_dropout": True,
    "emb_layer_norm_before": False,
    "layer_norm_eps": 1e-5,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 24}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 20.0,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 4, "sliding_window": None}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**_MOE, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "qwen3-moe-mixed": (
        "Qwen3MoeConfig",
        {
            **_MOE,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 48,
            "n_inner": 80,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "esm": ("EsmConfig", _ESM),
    "esm-wide": ("EsmConfig", {**_ESM, "hidden_size": 64, "num_hidden_layers": 3}),
    "esm-untied": ("EsmConfig", {**_ESM, "tie_word_embeddings": False}),
    "esmc": ("EsmcConfig", {**_ENCODER, "mask_token_id": 96}),
    "bert": ("BertConfig", _ENCODER),
}
LAYER_NORM = ("gpt2", "esm", "esm-untied", "esmc")
MASKED = ("esm", "esm-wide", "esm-untied", "esmc", "bert")
POST_NORMS = ("gemma3", "bert")
"""Families whose residual stream cannot be rotated."""


def tiny_model(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **others: Any
) -> Any:
    """A random model of ``CONFIGS``, in eval mode, with sdpa attention and plain experts.

    Args:
        others: Settings of its configuration in place of those.
    """
    config_class, changes = CONFIGS[name]
    shared = _LLAMA if "vocab_size" not in changes else {}
    config = getattr(transformers, config_class)(**{**shared, **changes, **others})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _auto_class(name).from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="eager"
        )
        _randomize(model)
    # as from_pretrained does: parameters only, rotary frequencies stay fp32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def _auto_class(name: str) -> Any:
    masked = name in MASKED
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) token ids, int64; never the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


class MemorySource:
    """A checkpoint reader over a model in memory; experts are stored one by one, as on disk."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.tensors: dict[str, Tensor] = {}
        tied = model._tied_weights_keys if model.config.tie_word_embeddings else {}
        for name, tensor in model.state_dict().items():
            if name not in tied:
                # as Source.renamed() gives Conv1D weights: (out, in)
                is_conv = re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name)
                self.tensors |= _as_stored(name, tensor.T if is_conv else tensor)

    def names(self) -> list[str]:
        return list(self.tensors)

    def load(self, name: str) -> Tensor:
        return self.tensors[name].clone()


def _randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if re.search(r"(?i)(norm(_after)?|ln_\w)\.weight$", name):
            is_offset = "Gemma" in type(model).__name__
            nn.init.uniform_(parameter, -0.5 if is_offset else 0.5, 0.5 if is_offset else 1.5)
        elif name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.5)
        else:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)


def _as_stored(name: str, tensor: Tensor) -> dict[str, Tensor]:
    prefix, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj":
        return {
            f"{prefix}.{e}.{part}.weight": half
            for e, both in enumerate(tensor)
            for part, half in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True)
        }
    if leaf == "down_proj":
        return {f"{prefix}.{e}.down_proj.weight": weight for e, weight in enumerate(tensor)}
    return {name: tensor}
