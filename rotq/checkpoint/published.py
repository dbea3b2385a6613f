"""A protein model from its makers' own file, as a folder that transformers reads."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotq.checkpoint.load import load_model
from rotq.checkpoint.shards import save_tensors


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model as transformers has it."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    vocabulary: tuple[str, ...] = ()
    """Of ESM's tokenizer."""
    tokenizer: str = ""
    """A tokenizer.json, where there is no vocabulary."""

    @property
    def num_parameters(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def write_published(model: Published, folder: Path) -> None:
    """Write configuration, weights and tokenizer into an empty folder, and read them back.

    Raises:
        RotqError: transformers has tensors that the model lacks, or of other shapes.
    """
    from transformers import AutoConfig

    dtypes = {tensor.dtype for tensor in model.tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    settings = dict(model.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, dtype=dtype)
    config.save_pretrained(folder)
    _tokenizer(model).save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.tensors.items()}
    save_tensors(folder / "model.safetensors", tensors)
    load_model(folder)


def _tokenizer(model: Published) -> Any:
    from tokenizers import Tokenizer
    from transformers import EsmTokenizer, PreTrainedTokenizerFast

    if not model.vocabulary:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(model.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.txt"
        file.write_text("\n".join(model.vocabulary), encoding="utf-8")
        return EsmTokenizer(str(file))
