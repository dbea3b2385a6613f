"""EXL3 checkpoints, rotq's and exllamav3's, in transformers: each layer is made dense once loaded.

This module is imported while transformers is, as ``quantizer`` is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rotq.checkpoint.safetensors import Entry, read_entries
from rotq.errors import RotqError
from rotq.formats.exl3 import MARKS
from rotq.layers.tiled_linear import TiledLinear

METHOD = "exl3"


class Exl3Config(QuantizationConfigMixin):
    """``quantization_config`` of an EXL3 checkpoint; nothing in it decides how it is read."""

    def __init__(self, quant_method: str = METHOD, **fields: Any) -> None:
        self.quant_method = quant_method
        for name, value in fields.items():
            setattr(self, name, value)


class Exl3HfQuantizer(HfQuantizer):
    """Puts layers in tiles in for the weights, and dense ones in for them once they are loaded.

    The model is a dense one then, and is saved as such.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise RotqError("an EXL3 checkpoint is loaded from its safetensors files")
        files = map(Path, checkpoint_files)
        put_tiled_linears(model, {e.name: e for file in files for e in read_entries(file)})

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        tiled = [(n, m) for n, m in model.named_modules() if isinstance(m, TiledLinear)]
        for name, layer in tiled:
            model.set_submodule(name, layer.dense(model.dtype))
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the dense weights."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The layers are dense."""
        return True


def put_tiled_linears(model: nn.Module, entries: dict[str, Entry]) -> None:
    """Replace the linear layers that the file has in tiles, on meta.

    Raises:
        RotqError: the tiles are of no layer of the model, do not have its shape, or have half bits;
            or signs are packed, as exllamav3 did before 2025-05.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for tensor in entries:
        name, _, leaf = tensor.rpartition(".")
        if leaf != "trellis":
            continue
        if name not in linears:
            raise RotqError(f"{tensor} belongs to no linear layer that the model has")
        model.set_submodule(name, _layer(name, linears[name], entries))


def _layer(name: str, linear: nn.Linear, entries: dict[str, Entry]) -> TiledLinear:
    layer = TiledLinear(
        linear.in_features,
        linear.out_features,
        tile_bits(name, entries),
        code=next((code for code in MARKS if f"{name}.{code}" in entries), "3inst"),
        bias=linear.bias is not None,
        dtype=linear.weight.dtype,
        device="meta",
    )
    for key, wanted in layer.state_dict().items():
        found = entries.get(f"{name}.{key}")
        if found is None:
            raise RotqError(f"{name} is in tiles, but the checkpoint has no {key} for it")
        if key not in MARKS and found.shape != wanted.shape:
            shapes = f"{list(found.shape)}, its configuration says {list(wanted.shape)}"
            raise RotqError(f"{name}.{key}: the checkpoint has shape {shapes}")
    return layer


def tile_bits(name: str, entries: Mapping[str, Entry]) -> int:
    """Of a layer's symbols, from the shape of its tiles.

    Raises:
        RotqError: no whole number from 1 to 8.
    """
    shape = entries[f"{name}.trellis"].shape
    if len(shape) != 3 or shape[2] not in range(16, 129, 16):
        raise RotqError(f"{name}.trellis has shape {list(shape)}; rotq reads 1 to 8 whole bits")
    return shape[2] // 16


def register() -> None:
    """Make EXL3 known to transformers, unless exllamav3 has; again is harmless."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, Exl3Config)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, Exl3HfQuantizer)
