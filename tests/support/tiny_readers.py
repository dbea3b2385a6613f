"""Small models in folders with a tokenizer of bytes, for what is between a text and a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

POSITIONS = 96
BYTES = 258
"""A token for each byte, one that pads and one that ends."""

_SHARED = {"vocab_size": BYTES, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
_WIDE = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_BOUND = {"max_position_embeddings": POSITIONS}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_SHARED, **_WIDE, "intermediate_size": 80}),
    "gpt2": ("GPT2Config", {**_SHARED, "n_embd": 48, "n_layer": 2, "n_head": 2,
                            "n_positions": POSITIONS}),
    "opt": ("OPTConfig", {**_SHARED, **_WIDE, **_BOUND, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "bert": ("BertConfig", {**_WIDE, **_BOUND, "intermediate_size": 80, "pad_token_id": 1}),
    "esm": ("EsmConfig", {**_WIDE, **_BOUND, "intermediate_size": 80, "pad_token_id": 1,
                          "mask_token_id": 32, "position_embedding_type": "absolute"}),
}  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Its ids are bytes plus two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<end>": 1} | {letter: 2 + i for i, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")


def reader(family: str, **changes: Any) -> Any:
    """A random model of ``FAMILIES``, in eval mode.

    Args:
        changes: To the model's configuration.
    """
    config_class, options = FAMILIES[family]
    options = {**options, **changes}
    masked = family in ("bert", "esm")
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(getattr(transformers, config_class)(**options)).eval()


def save_reader(folder: Path, family: str, tokenizer: Any, **changes: Any) -> Path:
    """A folder with such a model and its tokenizer.

    Args:
        folder: Made if it is not there.
        tokenizer: Of transformers.
        changes: To the model's configuration.
    """
    model = reader(family, **{"vocab_size": len(tokenizer), **changes})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
