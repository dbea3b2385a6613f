"""Tiny quantized checkpoints on disk, next to the dense model of equal weights in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoConfig

from rotq.checkpoint.export import (
    packed_tensors,
    quantization_config,
    stored_scale_dtype,
    write_metadata,
)
from rotq.checkpoint.obstacle import loading_obstacle
from rotq.checkpoint.opening import open_source
from rotq.checkpoint.quantizer import put_online_heads
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import assemble, save_tensors
from rotq.checkpoint.source import read_tensor
from rotq.formats.activations import ActivationGrid
from rotq.formats.integer import Grid, Quantized
from rotq.layers.online_heads import UNTOUCHED, OnlineHeads
from rotq.layers.online_linear import OnlineLinear
from rotq.models.experts import unfuse_experts
from rotq.models.families.gpt2 import linearize
from rotq.models.registry import adapter_for
from rotq.models.skeleton import Skeleton
from rotq.models.task import auto_class
from rotq.rotations.hadamard import random_signs

W4 = Grid(bits=4, group_size=8, symmetric=False)
W4_SYMMETRIC = Grid(bits=4, group_size=8, symmetric=True)
W3_CHANNEL = Grid(bits=3, group_size=-1, symmetric=False)
W8 = Grid(bits=8, group_size=8, symmetric=True)


def random_quantized(
    N: int, K: int, grid: Grid, scale_dtype: torch.dtype = torch.float16, seed: int = 0
) -> Quantized:
    """Random codes, scales and zero points, all of the grid's codes possible."""
    generator = torch.Generator().manual_seed(seed)
    groups = K // grid.columns_per_group(K)

    def codes(*shape: int) -> Tensor:
        low, high = grid.q_min, grid.q_max + 1
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)

    scale_NG = torch.rand(N, groups, generator=generator) / 2**grid.bits + 0.1 / 2**grid.bits
    return Quantized(
        q_NK=codes(N, K),
        scale_NG=scale_NG.to(scale_dtype),
        zero_NG=None if grid.symmetric else codes(N, groups),
        grid=grid,
    )


ONLINE = ("weight", "input_signs")
"""What an online layer holds that its packed tensors hold."""


@dataclass(frozen=True)
class Written:
    """A checkpoint folder and what it must compute."""

    path: Path
    dense: Any
    """The model with dequantized weights, in memory."""
    layers: dict[str, Grid]
    source: Path


def write_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    grids: tuple[Grid, ...] = (W4,),
    format: str = "compressed-tensors",
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float16,
    rotated: bool = False,
    block_size: int | None = None,
    inputs: ActivationGrid | None = None,
    heads: OnlineHeads = UNTOUCHED,
    outer: Grid | None = None,
    packs_embedding: bool = True,
    max_shard_bytes: int = 10**9,
) -> Written:
    """Write a tiny model with random codes; ``grids`` alternate over its linear layers.

    Args:
        rotated: The input of every down projection is rotated.
        block_size: In diagonal blocks of so many features.
        outer: Of the embedding, and of a head with a weight of its own; None leaves them dense.
        packs_embedding: False leaves it dense whatever ``outer`` is.
    """
    source, out = folder / "source", folder / "out"
    out.mkdir(parents=True)
    tiny_model(family, dtype=dtype).save_pretrained(source)
    config = AutoConfig.from_pretrained(source)
    model = auto_class(config).from_pretrained(source).eval()
    unfuse_experts(model)
    linearize(model)
    blocks = adapter_for(model).blocks
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Grid] = {}
    turned: list[str] = []
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for number, (name, linear) in enumerate(linears):
        if not name.startswith(f"{blocks}."):
            continue
        grid = layers[name] = grids[number % len(grids)]
        stored = stored_scale_dtype(
            scale_dtype, dtype, grid, format, has_experts=".experts." in name
        )
        N, K = linear.weight.shape
        quantized = random_quantized(N, K, grid, stored, seed=number)
        linear.weight.data = quantized.dequantize(dtype)
        signs_R = None
        if rotated and name.endswith("down_proj"):
            signs_R = random_signs(block_size or K, number)
            turned.append(name)
        layer = OnlineLinear.wrap(linear, signs_R=signs_R, input_grid=inputs)
        model.set_submodule(name, layer)
        tensors |= packed_tensors(name, quantized, signs_R)
    put_online_heads(model, heads)
    tied = model.all_tied_weights_keys
    adapter = adapter_for(model)
    own = f"{adapter.head}.weight" not in tied
    outer_names = [adapter.embedding] * packs_embedding + [adapter.head] * own
    packed_outer = {} if outer is None else pack_weights(model, outer_names, outer, scale_dtype)
    for name, codes in packed_outer.items():
        tensors |= packed_tensors(name, codes)
    for name, tensor in model.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        packed = (layer in layers or layer in packed_outer) and leaf in ONLINE
        if name not in tied and not packed:
            tensors[name] = tensor
    save_tensors(folder / "part.safetensors", tensors)
    opened = open_source(source)
    skeleton = Skeleton.open(opened)
    opened = opened.read_for(skeleton)
    assemble([folder / "part.safetensors"], out, max_shard_bytes, rename=opened.stored_name)
    quantization = quantization_config(
        layers,
        [name for name, _ in linears if name not in layers and name not in packed_outer],
        format,
        turned,
        block_size=block_size,
        outer={name: codes.grid for name, codes in packed_outer.items()},
        inputs=inputs,
        heads=heads,
        prefix=model.base_model_prefix,
        stored_name=opened.stored_name,
    )
    write_metadata(
        out,
        opened,
        quantization=quantization,
        recipe={"name": "tiny"},
        provenance={"seed": 0},
        dtype=dtype,
        untied=False,
        obstacle=loading_obstacle(skeleton, quantization, layers, opened.stored_name),
    )
    return Written(path=out, dense=model, layers=layers, source=source)


def pack_weights(
    model: Any, names: Sequence[str], grid: Grid, scale_dtype: torch.dtype
) -> dict[str, Quantized]:
    """Random codes for modules of a model, which gets what they stand for."""
    packed = {}
    for number, name in enumerate(names):
        weight = model.get_parameter(f"{name}.weight")
        packed[name] = random_quantized(*weight.shape, grid, scale_dtype, seed=100 + number)
        # in place: a tied head has the same tensor
        weight.data.copy_(packed[name].dequantize(weight.dtype))
    return packed


def edit_tensors(path: Path, change: dict[str, Tensor | None]) -> None:
    """Put tensors into a checkpoint's only file, or take out those that are None."""
    file = path / "model.safetensors"
    tensors = {entry.name: read_tensor(entry) for entry in read_entries(file)}
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_tensors(file, tensors)
