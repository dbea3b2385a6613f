"""Which layer gets which grid, and what that will cost, from the config alone."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from rotq.checkpoint.export import stored_scale_dtype
from rotq.formats.activations import ActivationGrid
from rotq.formats.integer import Grid, legal_group_sizes
from rotq.layers.online_linear import OnlineLinear
from rotq.models.adapter import Adapter
from rotq.models.attention.online import heads_of, set_heads
from rotq.models.skeleton import Skeleton
from rotq.recipe import Activations, KVCache, Recipe, Weights
from rotq.report import Estimate, SiteEstimate

IMPORTED_BYTES = 400_000_000
"""Resident memory of a process that has imported torch and transformers, as measured."""

TUNED_POSITIONS = 32
"""Positions whose logits tuning holds at a time."""

MEASURED_TOKENS = 8192
"""Calibration tokens that closed forms, layer errors and proxies are taken from."""

TRAINED_POSITIONS = 128
"""Positions whose logits the training of a basis holds at a time."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Grids by full layer name, in the order of solving; how scales are stored."""

    grids: Mapping[str, Grid]
    shapes: Mapping[str, tuple[int, int]]
    """Out features, in features of every planned layer."""
    scale_dtype: torch.dtype
    """Of stored scales: the recipe's, or the model's where the format's loaders need it."""
    notes: tuple[str, ...]
    inputs: ActivationGrid | None = None
    """What planned layers round their inputs to at run time; None leaves them."""
    kv: ActivationGrid | None = None
    """What keys and values are rounded to at run time; None leaves them."""

    def round_online(self, block: nn.Module, prefix: str, adapter: Adapter) -> None:
        """Let a dense block round at run time what the finished checkpoint will round; in place.

        Args:
            block: Again is harmless.
            prefix: Its full name.
        """
        if self.inputs is not None:
            full = [name for name in self.grids if name.startswith(f"{prefix}.")]
            for name in (name.removeprefix(f"{prefix}.") for name in full):
                linear = block.get_submodule(name)
                assert isinstance(linear, nn.Linear), f"{name} is planned, so it is a linear layer"
                block.set_submodule(name, OnlineLinear.wrap(linear, input_grid=self.inputs))
        if self.kv is not None:
            attention = block.get_submodule(adapter.attention)
            set_heads(attention, replace(heads_of(attention), grid=self.kv))


def activation_grid(section: Activations | KVCache) -> ActivationGrid | None:
    """What the recipe's section rounds to; None where it is off."""
    if section.bits == 16:
        return None
    return ActivationGrid(bits=section.bits, symmetric=section.symmetric)


def make_plan(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> Plan:
    """Give each linear layer of the blocks its grid.

    Raises:
        ValueError: a group size does not divide a layer's columns and the recipe does not say
            ``auto`` (names the layer and the legal sizes), no layer is left to quantize, or the
            output format cannot hold the family or what is rounded at run time.
    """
    if skeleton.adapter.transposed and recipe.output.format != "rotq":
        raise ValueError(
            f"{skeleton.adapter.family}'s layers are Conv1D, for which compressed-tensors has no "
            "name; set output.format=rotq"
        )
    inputs = activation_grid(recipe.activations)
    if inputs is not None and recipe.output.format != "rotq" and has_experts(skeleton):
        raise ValueError(
            "activations.bits: other loaders of compressed-tensors drop the rounding of what "
            "experts read; set output.format=rotq"
        )
    grids: dict[str, Grid] = {}
    shapes: dict[str, tuple[int, int]] = {}
    notes: list[str] = []
    for index in range(skeleton.num_blocks):
        block = skeleton.blocks[index]
        for site in skeleton.adapter.sites(block):
            names = [f"{skeleton.block_name(index)}.{name}" for name in site.linears]
            for name, short in zip(names, site.linears, strict=True):
                linear = block.get_submodule(short)
                assert isinstance(linear, nn.Linear)
                grid = layer_grid(name, linear.in_features, recipe.weights)
                if grid is None:
                    continue
                grids[name], shapes[name] = grid, (linear.out_features, linear.in_features)
            if len({grids.get(name) for name in names}) > 1:
                notes.append(f"{names[0]} and its siblings have several grids: vLLM fuses them")
    if not grids:
        raise ValueError("nothing to quantize: the recipe keeps every linear layer the model has")
    wanted: torch.dtype = getattr(torch, recipe.weights.scale_dtype)
    some_grid = next(iter(grids.values()))
    stored = stored_scale_dtype(
        wanted, dtype, some_grid, recipe.output.format, has_experts=has_experts(skeleton)
    )
    if stored != wanted:
        notes.append(
            f"scales are stored as {str(stored).removeprefix('torch.')}: other loaders need them so"
        )
    if inputs is not None and recipe.output.format != "rotq" and dtype != torch.float32:
        notes.append(
            f"other loaders find the scales of activations in {str(dtype).removeprefix('torch.')}, "
            "rotq in float32: their results differ"
        )
    return Plan(
        grids=grids,
        shapes=shapes,
        scale_dtype=stored,
        notes=tuple(notes),
        inputs=inputs,
        kv=activation_grid(recipe.kv_cache),
    )


def has_experts(skeleton: Skeleton) -> bool:
    """Whether any block is a mixture of experts."""
    return any(skeleton.adapter.has_experts(block) for block in skeleton.blocks)


def layer_grid(name: str, in_features: int, weights: Weights) -> Grid | None:
    """The recipe's grid for one layer; None if it is kept.

    Raises:
        ValueError: the group size does not divide ``in_features``, and no fallback is allowed.
    """
    bits, group_size = weights.bits, weights.group_size
    override = next((rule for rule in weights.overrides if re.search(rule.match, name)), None)
    if override is not None:
        if override.keep:
            return None
        bits, group_size = override.bits or bits, override.group_size or group_size
    if group_size != -1 and in_features % group_size and weights.group_fallback == "auto":
        smaller = [size for size in legal_group_sizes(in_features) if size < group_size]
        group_size = max(smaller, default=-1)
    grid = Grid(bits=bits, group_size=group_size, symmetric=weights.symmetric)
    try:
        grid.columns_per_group(in_features)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; or set weights.group_fallback=auto") from None
    return grid


def make_estimate(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> Estimate:
    """Bits, bytes and peak memory of a job; nothing but the config is read."""
    plan = make_plan(skeleton, recipe, dtype)
    scale_bits = plan.scale_dtype.itemsize * 8
    sites = tuple(
        SiteEstimate(
            name=name,
            shape=plan.shapes[name],
            bits=grid.bits,
            group_size=grid.group_size,
            bits_per_weight=grid.bits_per_weight(plan.shapes[name][1], scale_bits),
        )
        for name, grid in plan.grids.items()
    )
    packed_bits = sum(site.bits_per_weight * _numel(site.shape) for site in sites)
    planned = sum(_numel(site.shape) for site in sites)
    untied = _untied_head(skeleton, recipe)
    dense = _stored_parameters(skeleton) + untied - planned
    output_bytes = int(packed_bits / 8 + dense * dtype.itemsize)
    stream = (
        recipe.calibration.num_samples * recipe.calibration.seq_len * skeleton.config.hidden_size
    )
    streams = stream * dtype.itemsize * (2 if recipe.needs_original else 1)
    offload = recipe.calibration.offload
    return Estimate(
        sites=sites,
        bits_per_weight=packed_bits / max(planned, 1),
        output_bytes=output_bytes,
        peak_memory_bytes=_peak_memory(skeleton, recipe, dtype) + (0 if offload else streams),
        scratch_disk_bytes=2 * output_bytes + (streams if offload else 0),
    )


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
    return IMPORTED_BYTES + max(block_needs, outer, tuning, transform)


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
    trained = {options.method, *(options.candidates if options.method == "auto" else ())}
    if not trained & {"learned", "optrot"}:
        return 0
    config, block = skeleton.config, skeleton.blocks[0]
    weights = _numel_of(block.parameters()) * (dtype.itemsize + 3 * 4)
    rotations = 12 * 4 * config.hidden_size**2
    if "learned" not in trained:
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
    tied = skeleton.tied and recipe.rotation.residual != "none"
    return _embedding_numel(skeleton) if tied else 0


def _embedding_numel(skeleton: Skeleton) -> int:
    return _numel_of(skeleton.model.get_submodule(skeleton.adapter.embedding).parameters())


def _numel(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _numel_of(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
