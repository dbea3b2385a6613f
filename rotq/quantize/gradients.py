"""Gradient importance: how much the model's own loss feels an error in what a layer puts out.

    r_tc = mean over the rows n of group c of (d loss / d y_tn)^2,   y_t = W x_t
    H_c  = sum_t r_tc x_t x_t^T                                      for the rows of group c

(GuidedQuant, arXiv 2505.07004, eq. 6.) The loss is - sum_t log p(z_t) with z_t drawn from the model
itself, so that the mean of its squared gradients is the Fisher information, the curvature of the
divergence from the original model (YAQA, arXiv 2505.22988, section 3). A model that fills in masked
tokens is asked at those.

Blocks are streamed: one pass forward that keeps the inputs of all blocks in a file, one backward
that runs each block again and puts the slope in its input's place. Only the original model is
looked at, before the first block is rounded.

Shape suffixes: B windows, T positions, C positions of a chunk, D hidden size, M tokens of a batch,
padding included, N out features, G groups of rows, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rotq.calibration.batches import Batch
from rotq.calibration.capture import run_block
from rotq.calibration.streams import BatchStore, Stream
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import read_tensors
from rotq.disk.files import remove
from rotq.job.context import Job
from rotq.job.part_names import GRADIENTS, SENSITIVITIES, gradient_part
from rotq.job.parts import restored_outer
from rotq.memory import release_memory
from rotq.models.experts import calibrating
from rotq.models.streaming import through_head
from rotq.numerics import matmul_precision
from rotq.phases import phase
from rotq.quantize.output_moments import SUFFIX, OutputMoments
from rotq.quantize.rotated_model import RotatedModel
from rotq.quantize.sensitivity import Sensitivities
from rotq.quantize.slopes import (
    checked,
    inside_experts,
    observed,
    of_tokens,
    sampled_slope,
    with_mean_one,
)

SCORED_POSITIONS = 64
"""Positions whose logits are held at a time."""


class GradientPass:
    """Squared gradients at the outputs of all planned layers, a part of the job per block."""

    def __init__(self, job: Job, rotated: RotatedModel) -> None:
        self.job, self.rotated = job, rotated
        self.weighs_tokens = job.recipe.importance.strategy == "gradient"
        self.two_sided = job.recipe.solver.two_sided
        self.sensitivities = Sensitivities(job) if job.plan.units else None

    @phase("gradients")
    def run(self, start: Stream) -> None:
        """Write the parts of all blocks, and record what is felt of their rounding, unless there.

        Args:
            start: Hidden states before the first block; not modified.

        Raises:
            RotqError: the loss has no gradient somewhere, or one that is not finite; no room on the
                disk.
        """
        names = {
            GRADIENTS: self.weighs_tokens or self.two_sided,
            SENSITIVITIES: self.sensitivities is not None,
        }
        if all(self.job.finished(name) for name, wanted in names.items() if wanted):
            return
        what = "tokens" if self.weighs_tokens else "layers"
        self.job.progress.message(f"weighing {what} by gradients: one pass forward, one backward")
        ranks, batches = self.job.ranks, start.batches
        file = self.job.folder.path / f"hidden-gradients-{ranks.rank}"
        num_blocks = self.job.skeleton.num_blocks
        shapes = [hidden_BTD.shape for hidden_BTD in start.hidden]
        states = BatchStore.empty(shapes * (num_blocks + 1), self.job.dtype, file)
        first = ranks.first_of_own(len(self.job.windows.batches))
        with matmul_precision(self.job.recipe.calibration.precision):
            for number, hidden_BTD in enumerate(start.hidden):
                states[number] = hidden_BTD
            for index in range(num_blocks):
                self._forward(index, batches, states)
                self.job.progress.gradient_block("forward", index + 1, num_blocks)
            for number, batch in enumerate(batches):
                last = num_blocks * len(batches) + number
                states[last] = self._at_the_head(states[last], batch, first + number)
            for index in reversed(range(num_blocks)):
                self._backward(index, batches, states)
                self.job.progress.gradient_block("backward", num_blocks - index, num_blocks)
        ranks.once(self._record)
        remove(file)

    def _record(self) -> None:
        if self.weighs_tokens or self.two_sided:
            parts = [gradient_part(index) for index in range(self.job.skeleton.num_blocks)]
            self.job.folder.record(GRADIENTS, {}, parts)
        if self.sensitivities is not None:
            self.job.folder.record(SENSITIVITIES, {"losses": self.sensitivities.found}, [])

    def _forward(self, index: int, batches: Sequence[Batch], states: BatchStore) -> None:
        """What goes into the block is there; what comes out of it is added."""
        block = self.rotated.plain_block(index)
        for number, batch in enumerate(batches):
            given_BTD = states[index * len(batches) + number].to(self.job.device)
            mask_BT = batch.mask_on(self.job.device)
            kwargs = self.job.skeleton.block_kwargs(index, given_BTD, mask_BT)
            states[(index + 1) * len(batches) + number] = run_block(block, given_BTD, kwargs)
        release_memory()

    @functools.cached_property
    def _outer(self) -> dict[str, Tensor]:
        stored = restored_outer(self.job)
        return {name: tensor.to(self.job.device) for name, tensor in stored.items()}

    def _at_the_head(self, last_BTD: Tensor, batch: Batch, number: int) -> Tensor:
        """Slope of the loss at the last block's output, (B, T, D) on the CPU.

        Args:
            number: Of the batch among all, which decides what is drawn for it.
        """
        seed = self.job.recipe.calibration.seed * len(self.job.windows.batches) + number
        generator = torch.Generator().manual_seed(seed)
        asked_BT1 = batch.asked_BT[..., None].to(self.job.device)

        def slope(logits_BCV: Tensor, part: slice) -> Tensor:
            return sampled_slope(logits_BCV.float(), generator) * asked_BT1[:, part]

        logits = functools.partial(self.job.skeleton.logits, self._outer)
        last_BTD = last_BTD.to(self.job.device)
        return checked(through_head(logits, last_BTD, SCORED_POSITIONS, slope).cpu())

    def _backward(self, index: int, batches: Sequence[Batch], states: BatchStore) -> None:
        """Put the slope at the block's input in its place, and write the block's part."""
        block, prefix = self.rotated.plain_block(index), self.job.skeleton.block_name(index)
        full = [name for name in self.job.plan.grids if name.startswith(f"{prefix}.")]
        paths = [name.removeprefix(f"{prefix}.") for name in full]
        found: dict[str, list[Tensor]] = {path: [] for path in paths if self.weighs_tokens}
        outputs = OutputMoments() if self.two_sided else None
        if self.sensitivities is not None:
            self.sensitivities.start(block)
        for number, batch in enumerate(batches, index * len(batches)):
            state_BTD, slope_BTD = states[number], states[number + len(batches)]
            # window by window: a batch's graph would take a multiple of the memory
            for part in batch.windows():
                given = state_BTD[part].to(self.job.device).requires_grad_()
                seen = self._window(index, block, paths, given, slope_BTD[part], outputs)
                assert given.grad is not None, "a block's input reaches its output"
                state_BTD[part] = given.grad.to(state_BTD)
                if self.sensitivities is not None:
                    self.sensitivities.end_window(given.shape[1])
                for path in found:
                    square_TG = of_tokens(f"{prefix}.{path}", seen.get(path), given.shape[1])
                    found[path].append(square_TG)
            states[number] = state_BTD
        if self.sensitivities is not None:
            self.sensitivities.finish(index, block)
        if self.weighs_tokens or outputs is not None:
            self._save(index, block, found, outputs)
        release_memory()

    def _save(
        self,
        index: int,
        block: nn.Module,
        found: dict[str, list[Tensor]],
        outputs: OutputMoments | None,
    ) -> None:
        """Write what was found of each layer's tokens, with mean one, and of its rows."""
        prefix = self.job.skeleton.block_name(index)
        weights = {
            path: torch.cat(self.job.ranks.gathered(torch.cat(parts)))
            for path, parts in found.items()
        }
        experts = inside_experts(block)
        for path, square_MG in weights.items():
            weights[path] = with_mean_one(f"{prefix}.{path}", square_MG, path in experts)
        if outputs is not None:
            weights |= outputs.stored(prefix, self.job.ranks)
        part = self.job.folder.part(gradient_part(index))
        self.job.ranks.once(lambda: save_tensors(part, weights))

    def _window(
        self,
        index: int,
        block: nn.Module,
        paths: Sequence[str],
        given: Tensor,
        slope: Tensor,
        outputs: OutputMoments | None,
    ) -> dict[str, Tensor]:
        """Mean squared slopes (T, G) at the layers' outputs; ``given`` (1, T, D) gets its slope."""
        kwargs = self.job.skeleton.block_kwargs(index, given.detach())
        groups = self.job.recipe.importance.groups

        def see(path: str, x: Tensor, slope: Tensor) -> None:
            if self.sensitivities is not None:
                self.sensitivities.see(path, x, slope)
            if outputs is not None:
                outputs.see(path, slope)

        with torch.enable_grad(), calibrating(block), observed(block, paths, groups, see) as seen:
            run_block(block, given, kwargs).backward(slope.to(given))
        return seen


def gradient_weights(job: Job, index: int) -> dict[str, list[Tensor]]:
    """What a finished pass has found for a block.

    Returns:
        By path inside the block, for each batch of this process fp32 (tokens that are no padding,
        G), mean 1 over the tokens of all batches.
    """
    sizes = [batch.num_tokens for batch in job.windows.batches]
    stored = read_tensors(job.folder.part(gradient_part(index)))
    return {
        path: list(job.ranks.own(weight_MG.split(sizes)))
        for path, weight_MG in stored.items()
        if not path.endswith(SUFFIX)
    }
