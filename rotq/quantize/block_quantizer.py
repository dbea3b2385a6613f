"""Quantize one block: collect moments stage by stage, solve, put the rounded weights in place.

Two streams of hidden states pass through the blocks: the original model's (X) and the partly
quantized model's (X~). A stage's moments are taken after the stages before it were quantized.
Shape suffixes: N out features, K in features.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from rotq.calibration.streams import Streams
from rotq.checkpoint.export import packed_layer
from rotq.formats.integer import Grid
from rotq.job.context import Job
from rotq.layers.quant_linear import QuantLinear
from rotq.layers.tiled_linear import TiledLinear
from rotq.memory import large_blocks_mapped, trim_memory
from rotq.models.adapter import Site
from rotq.models.experts import routed_tokens
from rotq.quantize.block_runner import BlockRunner
from rotq.quantize.collected import Collected
from rotq.quantize.global_scales import set_input_scales, weight_scales
from rotq.quantize.output_moments import output_moments
from rotq.quantize.quantized_block import QuantizedBlock, layer_result
from rotq.quantize.rounded_weights import given_up, is_whole, linear_at, put_rounded
from rotq.quantize.token_weights import token_weights
from rotq.report import LayerResult
from rotq.solvers.curvature import Curvature
from rotq.solvers.solution import Solution, join_rows, split_rows
from rotq.solvers.solve import solve
from rotq.tuning.codes import train_codes

ROWS_PER_SOLVE = 16384
"""Rows of linears that share an input are solved together up to this many."""


class BlockQuantizer:
    """Rounds the linear layers of a job's blocks, one block at a time."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.runner = BlockRunner(job)

    def quantize(self, index: int, original: nn.Module, streams: Streams | None) -> QuantizedBlock:
        """Quantize block ``index``; of the streams, the original one is advanced past it.

        Args:
            index: Its position in the model.
            original: Already rotated, on the device. Not modified where a stream goes through it
                or codes are trained towards it; else it becomes the quantized block.
            streams: None if the recipe needs no data.
        """
        job, working = self.job, self._working(original, streams)
        job.plan.round_online(working, job.skeleton.block_name(index), job.skeleton.adapter)
        global_scales = weight_scales(job, index, original)
        set_input_scales(self.runner, index, working, streams)
        weights = None if streams is None else token_weights(job, index, working, streams)
        two_sided = streams is not None and job.recipe.solver.two_sided
        outputs = output_moments(job, index) if two_sided else {}
        packed: dict[str, QuantLinear | TiledLinear] = {}
        layers: list[LayerResult] = []
        routed: dict[str, list[int]] = {}
        stages = self._stages(index, working)
        for stage in stages:
            collected: Collected | None = None
            if streams is not None:
                last = stage is stages[-1]
                collected = self.runner.collect(
                    index, stage, (original, working), streams, weights, last
                )
                for path, counts in routed_tokens(working).items():
                    routed[path] = [int(count) for count in job.ranks.total(*counts)]
            for site in stage:
                features = linear_at(working, site.linears[0]).in_features
                with given_up(working, packed, features, job.device):
                    solutions, results = self._round(
                        index, site, (original, working), collected, global_scales, outputs
                    )
                packed |= solutions
                layers += results
                # what a solver has freed would add to what the next one needs
                trim_memory()
        if not stages and streams is not None and streams.original is not None:
            self.runner.advance(index, original, streams.original)
        training: dict[str, float] = {}
        if packed and streams is not None and job.recipe.tuning.code_steps:
            solved = {
                path: layer.quantized()
                for path, layer in packed.items()
                if isinstance(layer, QuantLinear)
            }
            trained, training = train_codes(job, index, (original, working), solved, streams)
            packed |= {path: packed_layer(codes) for path, codes in trained.items()}
        return QuantizedBlock(
            block=working,
            packed=packed,
            layers=tuple(layers),
            training=training,
            effective_share=1.0 if weights is None else weights.effective_share(job.ranks),
            routed=routed,
        )

    def _working(self, original: nn.Module, streams: Streams | None) -> nn.Module:
        """What is rounded: a block with the original's weights until it is given others."""
        is_read = streams is not None and streams.original is not None
        if not is_read and not self.job.recipe.tuning.code_steps:
            return original
        # copies of everything but the parameters
        return copy.deepcopy(original, {id(weight): weight for weight in original.parameters()})

    def _round(
        self,
        index: int,
        site: Site,
        blocks: tuple[nn.Module, nn.Module],
        collected: Collected | None,
        global_scales: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> tuple[dict[str, QuantLinear | TiledLinear], list[LayerResult]]:
        """Solve a site's layers from the original block, put the result into the working one.

        The site's moments are taken out of what was ``collected``, and used up.
        """
        started = time.monotonic()
        original, working = blocks
        grids = {name: self.job.plan.grids[self._full(index, name)] for name in site.linears}
        with large_blocks_mapped():
            options = self.job.recipe.solver
            moments = [None] if collected is None else collected.take(site.name)
            curvatures = [Curvature.of(some, options, spend=True) for some in moments]
            del moments
            solutions = dict(self._solve(site, grids, original, curvatures, global_scales, outputs))
            del curvatures
        seconds = (time.monotonic() - started) / len(solutions)
        results = []
        for name, solution in solutions.items():
            put_rounded(working, name, solution.quantized, self.job.device)
            results.append(layer_result(self.job, self._full(index, name), solution, seconds))
            self.job.progress.layer_done(results[-1])
        packed = {name: packed_layer(found.quantized) for name, found in solutions.items()}
        return packed, results

    def _stages(self, index: int, block: nn.Module) -> list[tuple[Site, ...]]:
        """Sites whose moments are collected in one pass; kept layers are left out.

        Where gradients weigh the tokens every layer has moments, and so a site, of its own; and
        where they tell how rows feel each other, as rows of two layers do not.
        """
        sites = self.job.skeleton.adapter.sites(block)
        kinds = list(dict.fromkeys(site.name.split(".")[0] for site in sites))
        stages: dict[int, list[Site]] = {}
        for site in sites:
            planned = tuple(
                name for name in site.linears if self._full(index, name) in self.job.plan.grids
            )
            if planned:
                position = kinds.index(site.name.split(".")[0])
                stage = stages.setdefault(min(position, self.job.recipe.solver.passes - 1), [])
                if self._are_alone:
                    stage += [Site(name=name, linears=(name,)) for name in planned]
                else:
                    stage.append(Site(name=site.name, linears=planned))
        return [tuple(stage) for stage in stages.values()]

    @property
    def _are_alone(self) -> bool:
        recipe = self.job.recipe
        return recipe.importance.strategy == "gradient" or recipe.solver.two_sided

    def _full(self, index: int, name: str) -> str:
        return f"{self.job.skeleton.block_name(index)}.{name}"

    def _solve(
        self,
        site: Site,
        grids: dict[str, Grid],
        original: nn.Module,
        curvatures: Sequence[Curvature],
        global_scales: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> Iterator[tuple[str, Solution]]:
        """Solve linears of one grid together: rows are independent.

        Args:
            curvatures: Of each group of their rows; one entry: they share the Hessian.
            global_scales: Of layers whose grid has one.
            outputs: Moments of the slopes of layers whose rows feel each other.
        """
        for names in _stacks(site.linears, grids, original, global_scales):
            weights = [linear_at(original, name).weight for name in names]
            stacked_NK = weights[0] if len(weights) == 1 else torch.cat(weights)
            solutions = [
                solve(
                    part_NK,
                    of_part,
                    grids[names[0]],
                    self.job.recipe.solver,
                    scale_dtype=self.job.plan.scale_dtype,
                    global_scale=global_scales.get(names[0]),
                    ranks=self.job.ranks,
                    seed=self.job.recipe.rotation.seed,
                    output_NN=outputs.get(names[0]),
                )
                for part_NK, of_part in zip(
                    stacked_NK.tensor_split(len(curvatures)), curvatures, strict=True
                )
            ]
            sizes = [weight.shape[0] for weight in weights]
            yield from zip(names, split_rows(join_rows(solutions), sizes), strict=True)


def _stacks(
    names: Sequence[str],
    grids: Mapping[str, Grid],
    block: nn.Module,
    global_scales: Mapping[str, Tensor],
) -> Iterator[list[str]]:
    """Runs of layers with one grid, each of at most ROWS_PER_SOLVE rows or a single layer.

    Those of a run have a global scale in common, where they have one.

    On a trellis layers are alone: where paths begin depends on a layer's rows. So are those whose
    rows share scales.
    """
    stack: list[str] = []
    rows = 0
    for name in names:
        size = linear_at(block, name).out_features
        alone = is_whole(grids[name]) or (
            bool(stack) and global_scales.get(name) is not global_scales.get(stack[0])
        )
        if stack and (alone or grids[name] != grids[stack[0]] or rows + size > ROWS_PER_SOLVE):
            yield stack
            stack, rows = [], 0
        stack.append(name)
        rows += size
    if stack:
        yield stack
