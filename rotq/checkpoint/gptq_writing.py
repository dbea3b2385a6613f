"""A quantized checkpoint in GPTQ's layout, which GPTQModel, vLLM, SGLang and others read.

    qweight  int32 (K bits / 32, N)    codes q - q_min along the columns
    qzeros   int32 (G, N bits / 32)    zero points z - q_min - 1; without the 1 in gptq_v2
    scales   fp16 (G, N)
    g_idx    int32 (K)                 the group of each column

Readers of the first version add 1 to each zero point where they are packed, so that a zero point of
0 would carry into its neighbour: with one, the file is written as gptq_v2.

Shape suffixes: N out features, K in features, G groups of K.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rotq
from rotq.checkpoint.files import read_json, write_json
from rotq.checkpoint.shards import assemble, save_tensors
from rotq.errors import RotqError
from rotq.formats.floats import FloatGrid
from rotq.formats.integer import Grid, Quantized
from rotq.formats.trellis import Trellis
from rotq.layers.packed_weight import PackedWeight
from rotq.layers.quant_linear import QuantLinear
from rotq.ops import pack

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BITS = (2, 3, 4, 8)
SHARD_BYTES = 5_000_000_000
BESIDE = (".json", ".jinja", ".model", ".txt")
"""Endings of files that go with the weights."""


def write_gptq(model: Any, folder: Path, output: Path) -> dict[str, Any]:
    """Write a packed model, its configuration and its tokenizer.

    Args:
        model: From ``load_model``, packed; nothing is done to its inputs at run time.
        folder: The checkpoint.
        output: An existing, empty folder.

    Returns:
        What was written.

    Raises:
        RotqError: the layout has no place for the family, an embedding or the grids.
    """
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    grid = _checked(model.config, packed)
    solved = {name: layer.quantized() for name, layer in packed.items()}
    offset = 0 if any(_has_zero_at_0(each) for each in solved.values()) else 1
    tensors = _rest(model, packed)
    for name, quantized in solved.items():
        tensors |= {
            f"{name}.{key}": tensor for key, tensor in gptq_tensors(quantized, offset).items()
        }
    whole = output / "whole.partial"
    save_tensors(whole, tensors)
    assemble([whole], output, SHARD_BYTES)
    whole.unlink()
    kept = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in f".{n}"
    ]
    config = read_json(folder / "config.json")
    quantization = _quantization(grid, kept, version=2 - offset)
    write_json(output / "config.json", {**config, "quantization_config": quantization})
    write_json(output / "quantize_config.json", quantization)
    _copy_beside(folder, output)
    change = max(_rounding(quantized) for quantized in solved.values())
    return {
        "layers": len(solved),
        "version": quantization["checkpoint_format"],
        "largest_change": change,
    }


def gptq_tensors(quantized: Quantized, offset: int) -> dict[str, Tensor]:
    """One layer's tensors.

    Args:
        offset: Taken from stored zero points: 1, or 0 in gptq_v2.
    """
    grid, (N, K) = quantized.grid, quantized.q_NK.shape
    G = quantized.scale_NG.shape[1]
    zero_NG = quantized.zero_NG
    if zero_NG is None:
        zero_NG = torch.zeros(N, G, dtype=torch.int8, device=quantized.q_NK.device)
    return {
        "qweight": pack(quantized.q_NK.T.contiguous(), grid.bits, dim=0),
        "qzeros": pack((zero_NG.T - offset).contiguous().to(torch.int8), grid.bits),
        "scales": quantized.scale_NG.T.contiguous().to(torch.float16),
        "g_idx": torch.arange(K, dtype=torch.int32) // (K // G),
    }


def _checked(config: Any, packed: Mapping[str, PackedWeight]) -> Grid:
    """The one grid of all layers.

    Raises:
        RotqError: the layout does not hold them; says what does.
    """
    if config.model_type not in FAMILIES:
        raise RotqError(
            f"{config.model_type} is not exported to GPTQ; known: {', '.join(FAMILIES)}"
        )
    for name, layer in packed.items():
        if not isinstance(layer, QuantLinear):
            raise RotqError(
                f"{name} is a packed embedding, for which GPTQ has no place; --format gguf has, or "
                "quantize with weights.embedding=16"
            )
        grid = layer.grid
        if isinstance(grid, FloatGrid | Trellis) or grid.bits not in BITS:
            raise RotqError(
                f"{name}: GPTQ holds integers of {', '.join(map(str, BITS))} bits; the checkpoint "
                "as it is, in compressed-tensors or rotq, holds these"
            )
        if any(size % 32 for size in layer.shape):
            raise RotqError(f"{name}: GPTQ packs 32 rows and columns at a time, of {layer.shape}")
    grids = {layer.grid for layer in packed.values()}
    if len(grids) > 1:
        raise RotqError(
            "layers have several grids, and GPTQ's readers know one; the checkpoint as it is holds "
            "them, and --format gguf"
        )
    return grids.pop()


def _has_zero_at_0(quantized: Quantized) -> bool:
    return quantized.zero_NG is not None and bool((quantized.zero_NG == quantized.grid.q_min).any())


def _rest(model: nn.Module, packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """What is stored dense, and the biases of packed layers; tied tensors once."""
    own = {f"{name}.{key}" for name, m in packed.items() for key in m.state_dict() if key != "bias"}
    seen: set[int] = set()
    rest = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in own and id(tensor) not in seen:
            seen.add(id(tensor))
            rest[name] = tensor
    return rest


def _quantization(grid: Grid, kept: Iterable[str], *, version: int) -> dict[str, Any]:
    kept = list(kept)
    return {
        "bits": grid.bits,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "desc_act": False,
        "group_size": grid.group_size,
        "lm_head": False,
        "meta": {"quantizer": [f"rotq:{rotq.__version__}"]},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": grid.symmetric,
        **(
            {"dynamic": {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in kept}}
            if kept
            else {}
        ),
    }


def _rounding(quantized: Quantized) -> float:
    """The largest relative change of a scale that fp16 rounds."""
    scale_NG = quantized.scale_NG.float()
    return float(((scale_NG.to(torch.float16).float() - scale_NG).abs() / scale_NG).max())


def _copy_beside(folder: Path, output: Path) -> None:
    """Tokenizer, chat template and generation's settings."""
    own = ("config.json", "report.json", "model.safetensors.index.json")
    for file in sorted(folder.iterdir()):
        is_ours = file.name in own or file.name.startswith("rotq_")
        if file.is_file() and file.suffix in BESIDE and not is_ours:
            shutil.copyfile(file, output / file.name)
