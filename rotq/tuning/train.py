"""After the last block: train scales and gains of all blocks together, codes stay as they are.

    minimize over u  mean_t KL(p_t || p^_t(u)),   W^ = (q - z) s e^u,   v^ = v + rms(v) u

p: the original model on a calibration window, p^: the quantized one; v: what stays dense and is a
vector (norm gains, biases). GPTQ minimizes the error of one layer at a time; this takes the part of
the remaining error that a rescaling can undo, with the objective of OSTQuant (KL-Top, arXiv
2501.13987) over the whole vocabulary. Adam, linear warm-up and decay. The windows of a step lie far
apart, so that processes that share the job have as many of them each.

Blocks are streamed here too: the forward pass keeps hidden states only, the backward pass runs each
block again, and a block's weight exists while it is run. The original model is not run at all: its
stream of hidden states ends with what the head reads.

Shape suffixes: B windows, T positions, D hidden size, N out features, G groups, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rotq.calibration.streams import Stream
from rotq.checkpoint.shards import save_tensors
from rotq.errors import RotqError
from rotq.job.context import Job
from rotq.job.part_names import OUTER, TUNING, block_part, tuned_part
from rotq.memory import large_blocks_mapped
from rotq.models.streaming import run_backward, run_forward
from rotq.numerics import matmul_precision
from rotq.phases import phase
from rotq.report import quarters
from rotq.tuning.tunable import TunableBlock, TunableOuter

MAPPED_FROM = 3 << 19
"""Bytes: weights in the making come and go with each block; 30 MB less for a fifth of the time."""


@phase("tuning")
def tune(
    job: Job,
    blocks: Sequence[nn.Module],
    original: Stream,
    original_outer: Mapping[str, Tensor] | None = None,
) -> None:
    """Train, and write every part of the job anew with what was found; codes are copied.

    Args:
        job: All of its parts are finished.
        blocks: From ``hollow``, one per block of the model.
        original: The original model's stream, behind its last block.
        original_outer: What lies outside its blocks; None: as it is stored, not packed.

    Raises:
        RotqError: the divergence is not finite; names the step.
    """
    trained = [TunableBlock(job, index, block) for index, block in enumerate(blocks)]
    outer = TunableOuter(job, original_outer)
    with large_blocks_mapped(MAPPED_FROM):
        divergences = _train(job, trained, outer, original)
    job.ranks.once(lambda: _save(job, trained, outer, divergences))


def _save(
    job: Job, trained: Sequence[TunableBlock], outer: TunableOuter, divergences: list[float]
) -> None:
    parts = [tuned_part(block_part(index)) for index in range(len(trained))]
    for part, block in zip(parts, trained, strict=True):
        save_tensors(job.folder.part(part), block.tuned())
    parts.append(tuned_part(OUTER))
    save_tensors(job.folder.part(parts[-1]), outer.tuned())
    first, last = quarters(divergences)
    job.folder.record(
        TUNING,
        {
            "steps": len(divergences),
            "kl_first_quarter": first,
            "kl_last_quarter": last,
        },
        parts,
    )


def hollow(block: nn.Module) -> nn.Module:
    """A copy of a block with its parameters on meta; buffers are shared."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in block.buffers()}
    for parameter in block.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    config = getattr(block, "config", None)
    return copy.deepcopy(block, memo | {id(config): config})


def _train(
    job: Job, blocks: list[TunableBlock], outer: TunableOuter, original: Stream
) -> list[float]:
    """All steps; the divergence before each."""
    tuning = job.recipe.tuning
    changes = [*outer.vectors.changes.values(), *(c for block in blocks for c in block.changes())]
    optimizer = torch.optim.Adam(changes, lr=tuning.learning_rate, betas=(0.9, 0.95))
    windows = _windows(job)
    divergences: list[float] = []
    with matmul_precision(job.recipe.calibration.precision), torch.enable_grad():
        for step in range(tuning.steps):
            for group in optimizer.param_groups:
                group["lr"] = tuning.learning_rate * _schedule(step, tuning.steps)
            optimizer.zero_grad()
            of_step = _of_step(windows, step, tuning.windows)
            divergence = _step(job, blocks, outer, changes, original, of_step)
            if not divergence < float("inf"):
                raise RotqError(f"tuning: the divergence is {divergence} at step {step + 1}")
            optimizer.step()
            divergences.append(divergence)
            job.progress.tuning_step(step, tuning.steps, divergence)
    return divergences


Window = tuple[int, tuple[slice, slice]]
"""Number of its batch among all, and where it is in that; padding is cut off."""


def _windows(job: Job) -> list[Window]:
    """All windows of the job.

    A model that sees both sides must be given the window that the original was given.
    """
    longest = 0 if job.skeleton.masked else job.recipe.tuning.seq_len
    return [
        (number, part)
        for number, batch in enumerate(job.windows.batches)
        for part in batch.windows(longest)
    ]


def _of_step(windows: Sequence[Window], step: int, count: int) -> list[Window]:
    """The next of ``count`` stretches of the windows, from each one."""
    starts = [len(windows) * part // count for part in range(count)]
    return [windows[(start + step) % len(windows)] for start in starts]


def _step(
    job: Job,
    blocks: list[TunableBlock],
    outer: TunableOuter,
    changes: Sequence[Tensor],
    original: Stream,
    windows: Sequence[Window],
) -> float:
    """Mean divergence of the windows, and its gradients; each process runs those that it has."""
    first, divergence = job.ranks.first_of_own(len(job.windows.batches)), 0.0
    for number, part in windows:
        own = number - first
        if 0 <= own < len(original.batches):
            ids_BT = original.batches[own].ids_BT[part]
            hidden_BTD = original.hidden[own][part]
            divergence += _backward(job, blocks, outer, ids_BT, hidden_BTD)
    job.ranks.sum_gradients(changes)
    if len(windows) > 1:
        for change in changes:
            if change.grad is not None:
                change.grad /= len(windows)
    return job.ranks.total(divergence)[0] / len(windows)


def _schedule(step: int, steps: int) -> float:
    """Four steps of linear warm-up, then linear decay to 2 %."""
    return min(1.0, (step + 1) / 4) * max(0.02, 1 - step / steps)


def _backward(
    job: Job,
    blocks: list[TunableBlock],
    outer: TunableOuter,
    ids_BT: Tensor,
    original_BTD: Tensor,
) -> float:
    """Gradients of one window's divergence, added to the changes; returns the divergence."""
    skeleton = job.skeleton
    hidden_BTD = skeleton.embed(outer.stored, ids_BT.to(job.device))
    kwargs = [skeleton.block_kwargs(index, hidden_BTD) for index in range(len(blocks))]
    runs = [
        functools.partial(block.run, kwargs=given)
        for block, given in zip(blocks, kwargs, strict=True)
    ]
    *states, last_BTD = run_forward(runs, hidden_BTD)
    divergence, slope_BTD = outer.divergence(last_BTD, original_BTD.to(job.device))
    run_backward(runs, states, slope_BTD)
    return divergence
