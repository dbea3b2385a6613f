"""What readers want beside the tensors of an EXL3 file, and which models it is written for.

    config.json                quantization_config: method, bits, head, calibration, code
    quantization_config.json   the same, with the stored tensors of each quantized layer
    quantize_config.json       the same for GPTQModel 7, which takes the version for the format

The head stays dense, and tied where it was; exllamav3 loads it so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from rotq.checkpoint.files import write_json
from rotq.checkpoint.safetensors import Entry, read_entries
from rotq.formats.exl3 import BLOCK, MARKS
from rotq.formats.integer import Grid
from rotq.recipe import Calibration

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
STORAGE, FOR_GPTQMODEL = "quantization_config.json", "quantize_config.json"
VERSION = "1.6.5"
"""Of exllamav3, whose files these are like."""

DTYPES = {"I16": "int16", "I32": "int32", "F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def check_exl3(kind: str, linears: Mapping[str, nn.Linear]) -> None:
    """Refuse a model that exllamav3's files are not written for.

    Args:
        kind: Its ``model_type``.
        linears: Of its blocks, by full name.

    Raises:
        ValueError: another family, or a bias that would have to be padded.
    """
    if kind not in FAMILIES:
        raise ValueError(
            f"output.format=exl3 is for {', '.join(FAMILIES)}, not {kind}; set output.format=rotq"
        )
    for path, linear in linears.items():
        if linear.bias is not None and linear.out_features % BLOCK:
            raise ValueError(
                f"output.format=exl3: {path} has a bias for {linear.out_features} features, which "
                f"are no multiple of {BLOCK}; set output.format=rotq"
            )


def exl3_config(
    grids: Mapping[str, Grid], shapes: Mapping[str, tuple[int, int]], calibration: Calibration
) -> dict[str, Any]:
    """The ``quantization_config`` of config.json.

    Args:
        grids: By full layer name.
        shapes: Out features, in features.
    """
    weights = sum(prod(shapes[name]) for name in grids)
    bits = sum(grid.bits * prod(shapes[name]) for name, grid in grids.items()) / weights
    return {
        "quant_method": "exl3",
        "version": VERSION,
        "bits": round(bits, 2),
        "head_bits": 16,
        "calibration": {"rows": calibration.num_samples, "cols": calibration.seq_len},
        "out_scales": "always",
        "codebook": "mul1",
    }


def write_storage(folder: Path, weights: Sequence[Path], quantization: Mapping[str, Any]) -> None:
    """Write quantization_config.json and quantize_config.json.

    Args:
        weights: The checkpoint's safetensors files.
        quantization: From ``exl3_config``.
    """
    layers: dict[str, dict[str, Entry]] = {}
    for entry in sorted((e for file in weights for e in read_entries(file)), key=lambda e: e.name):
        layers.setdefault(entry.name.rpartition(".")[0], {})[entry.name] = entry
    storage = {
        name: _stored(name, entries)
        for name, entries in layers.items()
        if f"{name}.trellis" in entries
    }
    told = {**quantization, "tensor_storage": storage}
    write_json(folder / STORAGE, told)
    del told["version"], told["head_bits"]
    write_json(folder / FOR_GPTQMODEL, {**told, "format": "exl3"})


def _stored(name: str, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """As exllamav3 describes a layer; ``torch_dtype`` is what GPTQModel reads."""
    return {
        "stored_tensors": {
            key: {
                "shape": list(entry.shape),
                "n_bytes": entry.num_bytes,
                "dtype": f"torch.{DTYPES[entry.dtype]}",
                "torch_dtype": DTYPES[entry.dtype],
            }
            for key, entry in entries.items()
        },
        "quant_format": "exl3",
        "bits_per_weight": entries[f"{name}.trellis"].shape[2] // 16,
        "mul1_multiplier": MARKS["mul1"],
    }
