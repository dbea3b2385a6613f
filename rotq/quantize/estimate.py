"""What a job will cost, before any weight is loaded: bits, bytes on the disk, peak memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from rotq.checkpoint.location import ModelName
from rotq.formats.integer import Grid
from rotq.job.plan import Plan, make_plan
from rotq.models.skeleton import Skeleton
from rotq.ops import is_native
from rotq.quantize.own_text import writing_memory
from rotq.quantize.setup import settle_described
from rotq.recipe import Recipe
from rotq.report import Estimate, SiteEstimate
from rotq.report.lines import larger_line
from rotq.transform.teacher import TRAINED_POSITIONS
from rotq.transform.windows import MEASURED_TOKENS
from rotq.tuning.tunable import TUNED_POSITIONS

IMPORTED_BYTES = 400_000_000
"""Resident memory of a process that has imported torch and transformers, as measured."""

COMPILER_BYTES = 190_000_000
"""What numba and its compiler add, as measured."""


def estimate(
    model: ModelName,
    recipe: Recipe,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Estimate:
    """What ``quantize_model`` would make and need; no weight is read.

    Calibration windows are drawn and dropped, so that a text is refused here as in the job.

    Raises:
        ValueError, RotqError: as ``quantize_model``, before its first block.
    """
    settled = settle_described(
        model, recipe, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    made = make_estimate(settled.skeleton, recipe, settled.dtype, settled.plan.rest_dtype)
    source_bytes, is_packed = settled.source.quantized_bytes, bool(settled.plan.outer)
    larger = larger_line(made.output_bytes, source_bytes, is_packed=is_packed)
    return replace(made, notes=() if larger is None else (larger,))


def make_estimate(
    skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype, rest_dtype: torch.dtype | None = None
) -> Estimate:
    """Bits, bytes and peak memory of a job; nothing but the config is read.

    Args:
        dtype, rest_dtype: As for ``make_plan``.
    """
    plan = make_plan(skeleton, recipe, dtype, rest_dtype)
    sites = _sites(plan, plan.grids)
    outer = _sites(plan, plan.outer)
    packed_bits, outer_bits = (
        sum(site.bits_per_weight * _numel(site.shape) for site in some) for some in (sites, outer)
    )
    planned, planned_outer = (sum(_numel(site.shape) for site in some) for some in (sites, outer))
    if recipe.is_mixed:
        packed_bits = recipe.weights.average_bits * planned
    untied = _untied_head(skeleton, recipe)
    dense = _stored_parameters(skeleton) + untied - planned - planned_outer
    output_bytes = int((packed_bits + outer_bits) / 8 + dense * plan.rest_dtype.itemsize)
    streams = _stream_bytes(skeleton, recipe, dtype)
    offload = recipe.calibration.offload
    return Estimate(
        sites=(*sites, *outer),
        bits_per_weight=packed_bits / max(planned, 1),
        output_bytes=output_bytes,
        peak_memory_bytes=_peak_memory(skeleton, recipe, dtype) + (0 if offload else streams),
        scratch_disk_bytes=2 * output_bytes
        + (streams if offload else 0)
        + _gradient_bytes(skeleton, recipe, dtype),
        limits=plan.limits,
    )


def _sites(plan: Plan, grids: Mapping[str, Grid]) -> tuple[SiteEstimate, ...]:
    choices = {
        name: tuple((grid.bits, grid.group_size) for grid in unit.grids)
        for unit in plan.units
        for name in unit.layers
    }
    return tuple(
        SiteEstimate(
            name=name,
            shape=plan.shapes[name],
            bits=grid.bits,
            group_size=grid.group_size,
            bits_per_weight=grid.bits_per_weight(plan.shapes[name][1], plan.scale_bits),
            choices=choices.get(name, ()),
        )
        for name, grid in grids.items()
    )


def _stream_bytes(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> int:
    """Hidden states of all calibration windows between two blocks."""
    tokens = recipe.calibration.num_samples * recipe.calibration.seq_len
    streams = 2 if recipe.needs_original else 1
    return int(tokens * skeleton.config.hidden_size * dtype.itemsize * streams)


def _gradient_bytes(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> int:
    """Hidden states between all blocks, where gradients weigh tokens or layers."""
    if not recipe.needs_gradients:
        return 0
    tokens = recipe.calibration.num_samples * recipe.calibration.seq_len
    states = tokens * int(skeleton.config.hidden_size) * dtype.itemsize
    return (skeleton.num_blocks + 1) * states


def _peak_memory(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> int:
    """Imports, then the larger of the outer tensors and one block with its statistics."""
    block = skeleton.blocks[0]
    widest = max(linear.in_features for linear in block.modules() if isinstance(linear, nn.Linear))
    block_bytes = _numel_of(block.parameters()) * (8 + 2 * dtype.itemsize)
    solving = 16 * 4 * widest**2
    tokens = recipe.calibration.batch_size * recipe.calibration.seq_len
    activations = 6 * tokens * widest * dtype.itemsize
    outer = 3 * _embedding_numel(skeleton) * dtype.itemsize
    block_needs = block_bytes + max(solving, activations)
    tuning, transform = (
        need(skeleton, recipe, dtype) for need in (_tuning_memory, _transform_memory)
    )
    writing = writing_memory(skeleton, recipe.calibration, dtype)
    imported = IMPORTED_BYTES
    if recipe.solver.method == "gptq" and is_native():
        imported += COMPILER_BYTES
    return imported + max(block_needs, outer, tuning, transform, writing)


def _tuning_memory(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> int:
    """One block with gradients, hidden states between blocks, outer tensors, a chunk of logits."""
    if not recipe.tuning.steps:
        return 0
    tokens = recipe.tuning.seq_len or recipe.calibration.seq_len
    hidden = (skeleton.num_blocks + 1) * tokens * skeleton.config.hidden_size * dtype.itemsize
    weights = _numel_of(skeleton.blocks[0].parameters()) * (4 + 2 * dtype.itemsize)
    vocabulary = _embedding_numel(skeleton) // skeleton.config.hidden_size
    logits = 4 * 4 * TUNED_POSITIONS * vocabulary
    return hidden + weights + logits + _embedding_numel(skeleton) * dtype.itemsize


def _transform_memory(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> int:
    """Training a basis: one block fused with gradients, and what grows with the window.

    The block is held as loaded and three times in fp32: fused, a product on the way, gradients. R1
    is held about twelve times: start, parameters, gradients, moments, factors of its inverse.
    """
    options = recipe.transform
    if options.method == "fixed":
        return 0
    config, block = skeleton.config, skeleton.blocks[0]
    weights = _numel_of(block.parameters()) * (dtype.itemsize + 3 * 4)
    rotations = 12 * 4 * config.hidden_size**2
    if options.method == "optrot":
        return weights + rotations
    tokens = options.seq_len or recipe.calibration.seq_len
    states = (skeleton.num_blocks + 1) * tokens * config.hidden_size * dtype.itemsize
    measured = MEASURED_TOKENS * config.hidden_size * 4
    if options.layer_steps:
        measured *= skeleton.num_blocks + 1
    widths = sum(
        m.in_features + m.out_features for m in block.modules() if isinstance(m, nn.Linear)
    )
    graph = 4 * tokens * widths * 4
    vocabulary = _embedding_numel(skeleton) // config.hidden_size
    logits = 4 * 4 * TRAINED_POSITIONS * vocabulary
    num_windows = min(options.steps, recipe.calibration.num_samples)
    likely = num_windows * tokens * min(options.top_k, vocabulary) * 8
    outer = _embedding_numel(skeleton) * dtype.itemsize * (1 if skeleton.tied else 2)
    return weights + rotations + max(states + graph + logits + likely, measured) + outer


def _stored_parameters(skeleton: Skeleton) -> int:
    """Parameters of the source: a tied head is none of its own."""
    tied_head = f"{skeleton.adapter.head}.weight" if skeleton.tied else ""
    parameters = skeleton.model.named_parameters()
    return _numel_of(parameter for name, parameter in parameters if name != tied_head)


def _untied_head(skeleton: Skeleton, recipe: Recipe) -> int:
    """Parameters that untying adds: a rotated residual stream needs its own head."""
    turned = skeleton.adapter.turns_outer(recipe.rotation, skeleton.config)
    return _embedding_numel(skeleton) if skeleton.tied and turned else 0


def _embedding_numel(skeleton: Skeleton) -> int:
    return _numel_of(skeleton.model.get_submodule(skeleton.adapter.embedding).parameters())


def _numel(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _numel_of(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
