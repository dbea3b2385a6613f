"""Peak memory of a job, step by step, from the sizes of a model and its recipe.

A step's bytes are what is held in it besides the process itself and, unless they are on the disk,
the streams. The largest step decides.

Shape suffixes: N out features, K in features, P parameters of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import nn

from rotq.job.plan import Plan
from rotq.models.skeleton import Skeleton
from rotq.quantize.collected import waits_on_disk
from rotq.quantize.own_text import writing_memory
from rotq.quantize.rounded_weights import is_large
from rotq.recipe import Recipe
from rotq.report.lines import ROTATIONS
from rotq.solvers.factor import PANEL
from rotq.solvers.parts import rows_at_once
from rotq.transform.teacher import TRAINED_POSITIONS
from rotq.transform.windows import MEASURED_TOKENS
from rotq.tuning.tunable import TUNED_POSITIONS

COPIES_OF_ROWS = 10
"""fp32 copies of the rows that are solved at a time: targets, scales, codes, errors."""


def peak_memory(
    skeleton: Skeleton, recipe: Recipe, plan: Plan, dtype: torch.dtype, threads: int
) -> dict[str, int]:
    """Bytes by step, of one process.

    Args:
        dtype: Of activations and dense weights.
        threads: That solve rows side by side.
    """
    sizes = _Sizes(skeleton, recipe, plan, dtype, threads)
    found = {
        "embedding and head": sizes.outer(),
        "loading a block": sizes.loading(),
        "forward passes": sizes.passes(),
        "solving": sizes.solving(),
        "packing": sizes.packing(),
        "tuning": _tuning_memory(skeleton, recipe, dtype),
        "transform": _transform_memory(skeleton, recipe, dtype),
        "own text": writing_memory(skeleton, recipe.calibration, dtype),
    }
    return {step: num_bytes for step, num_bytes in found.items() if num_bytes}


class _Sizes:
    """Of the largest block."""

    def __init__(
        self, skeleton: Skeleton, recipe: Recipe, plan: Plan, dtype: torch.dtype, threads: int
    ) -> None:
        self.skeleton, self.recipe, self.plan, self.threads = skeleton, recipe, plan, threads
        self.dtype = dtype
        parameters = [_numel(block.parameters()) for block in skeleton.blocks]
        index = max(range(len(parameters)), key=parameters.__getitem__)
        block, prefix = skeleton.blocks[index], skeleton.block_name(index)
        self.parameters = parameters[index]
        self.linears = {
            path: linear for path, linear in block.named_modules() if isinstance(linear, nn.Linear)
        }
        self.sites: dict[str, list[tuple[int, int]]] = {}
        """(N, K) of the planned sites of each kind, N summed over the site's layers."""
        for site in skeleton.adapter.sites(block):
            planned = [self.linears[p] for p in site.linears if f"{prefix}.{p}" in plan.grids]
            if planned:
                shape = sum(each.out_features for each in planned), planned[0].in_features
                self.sites.setdefault(site.name.split(".")[0], []).append(shape)
        self.turned = any(getattr(recipe.rotation, name) != "none" for name in ROTATIONS)

    @property
    def weights(self) -> int:
        """The block, twice where a stream goes through the original too; and what is packed."""
        copies = 2 if self.recipe.needs_original or self.recipe.tuning.code_steps else 1
        bits = max(grid.bits for grid in self.plan.grids.values())
        return int(self.parameters * (copies * self.dtype.itemsize + bits / 8))

    def outer(self) -> int:
        """Embedding and head: as loaded, and as they are written or read back."""
        skeleton, plan = self.skeleton, self.plan
        table, width = _embedding_numel(skeleton), self.dtype.itemsize
        stored = plan.rest_dtype.itemsize
        if self.turned or self.recipe.transform.method != "fixed":
            return table * (2 * width + max(width, 2 * stored * (stored != width)))
        copies = 2 * table * width
        if stored != width:
            copies += table * stored
        return copies + (table if plan.outer else 0)

    def loading(self) -> int:
        """A block as it is read; in fp64 where it is turned, with products of its largest layer."""
        largest = max(linear.weight.numel() for linear in self.linears.values())
        plain = self.parameters * self.dtype.itemsize
        if not self.turned and self.recipe.transform.method == "fixed":
            return plain + largest * self.dtype.itemsize
        return self.parameters * 8 + plain + 3 * largest * 8

    def moments(self) -> int:
        """H, and D, of all sites of the stage that has the most; of large ones, one at a time."""
        if not self.recipe.needs_data:
            return 0
        kinds = list(self.sites.values())
        passes = self.recipe.solver.passes
        stages = [*kinds[: passes - 1], [site for kind in kinds[passes - 1 :] for site in kind]]
        summed = [[K for _, K in stage if not waits_on_disk(self.recipe, K)] for stage in stages]
        return max(sum(map(self._moments, features)) for features in summed)

    def _moments(self, features: int) -> int:
        return (8 if self.recipe.needs_original else 4) * features**2

    @property
    def _widest(self) -> int:
        return max(K for kind in self.sites.values() for _, K in kind)

    def passes(self) -> int:
        """Moments, and what a batch of windows comes to inside the block."""
        if not self.recipe.needs_data:
            return 0
        calibration = self.recipe.calibration
        tokens = calibration.batch_size * calibration.seq_len
        widths = sum(linear.out_features for linear in self.linears.values())
        inside = tokens * (widths + 3 * self._widest) * self.dtype.itemsize
        return self.weights + self.moments() + inside + 2 * 4 * tokens * self._widest

    def solving(self) -> int:
        """Moments and a factor beside them, or in their place; and rows that are solved."""
        solver, widest = self.recipe.solver, self._widest
        factored = int(solver.method == "gptq")
        factor = 4 * widest**2 * factored * int(solver.looks_at_hessian)
        panels = 3 * 8 * PANEL * widest * factored
        rows = self.threads * rows_at_once(widest) * widest * 4 * COPIES_OF_ROWS
        if solver.two_sided:
            rows = self.rows_together()
        weights, moments = self.weights, self.moments()
        if self.recipe.needs_data and waits_on_disk(self.recipe, widest):
            moments = max(moments, self._moments(widest))
        if solver.method == "gptq" and is_large(widest):
            # what was rounded before the widest site is given up
            own = sum(N * K for kind in self.sites.values() for N, K in kind if widest == K)
            weights -= (self.parameters - own) * self.dtype.itemsize
        return weights + moments + factor + max(panels, rows)

    def rows_together(self) -> int:
        """H_O of all layers, of the tallest as it is factored, and copies of its weight."""
        shapes = [linear.weight.shape for linear in self.linears.values()]
        tallest, numel = max(N for N, _ in shapes), max(N * K for N, K in shapes)
        moments = sum(4 * N**2 for N, _ in shapes)
        return moments + 4 * 8 * tallest**2 + 4 * COPIES_OF_ROWS * numel

    def packing(self) -> int:
        """Codes of the largest site, and the words of the largest layer of it."""
        largest = max(linear.weight.numel() for linear in self.linears.values())
        site = max(N * K for kind in self.sites.values() for N, K in kind)
        return self.weights + site + 4 * largest


def _tuning_memory(skeleton: Skeleton, recipe: Recipe, dtype: torch.dtype) -> int:
    """One block with gradients, hidden states between blocks, outer tensors, a chunk of logits."""
    if not recipe.tuning.steps:
        return 0
    tokens = recipe.tuning.seq_len or recipe.calibration.seq_len
    hidden = (skeleton.num_blocks + 1) * tokens * skeleton.config.hidden_size * dtype.itemsize
    weights = _numel(skeleton.blocks[0].parameters()) * (4 + 2 * dtype.itemsize)
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
    weights = _numel(block.parameters()) * (dtype.itemsize + 3 * 4)
    rotations = 12 * 4 * config.hidden_size**2
    if options.method == "optrot":
        return int(weights + rotations)
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
    return int(weights + rotations + max(states + graph + logits + likely, measured) + outer)


def _embedding_numel(skeleton: Skeleton) -> int:
    return _numel(skeleton.model.get_submodule(skeleton.adapter.embedding).parameters())


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(prod(parameter.shape) for parameter in parameters)
