"""Embedding and head rounded, and the part of the job with all that lies outside the blocks.

    W^ = q s,    scales searched for the least sum |W - W^|^2.4 of each group

No data is looked at: a row of the table is read for its token alone, and its error is what that
token's hidden states begin with. (GPTQ on the head is not tried.)

Shape suffixes: V vocabulary, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from rotq.checkpoint.export import packed_tensors
from rotq.checkpoint.shards import Deferred, save_tensors
from rotq.formats.integer import Grid
from rotq.job.context import Job
from rotq.job.part_names import OUTER
from rotq.memory import trim_memory
from rotq.phases import phase
from rotq.quantize.quantized_block import layer_result
from rotq.recipe import Solver
from rotq.rotations.basis import Basis
from rotq.solvers.solution import Solution, join_rows
from rotq.solvers.solve import solve

ROUNDING = Solver(method="rtn", scale_search="mse")

ROWS_AT_ONCE = 1024
"""Of a table, in fp32; what was tried on them is given back before the next."""


@phase("packing")
def save_outer(
    job: Job,
    fused: dict[str, Tensor],
    basis: Basis,
    later: Mapping[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Write the part: what the plan says packed, and the rest as the plan stores it.

    Args:
        fused: Tensors outside the blocks, in the basis; a tied head may be missing.
        later: Weights that are loaded when they are rounded or written, by name.
    """
    tensors, layers, later = dict(fused), [], dict(later or {})
    packed: dict[str, Tensor] = {}
    for name, grid in job.plan.outer.items():
        started = time.monotonic()
        weight = f"{name}.weight"
        weight_VD = later.pop(weight)() if weight in later else tensors.pop(weight)
        solution = _rounded(weight_VD, grid, job.plan.scale_dtype)
        del weight_VD
        packed |= packed_tensors(name, solution.quantized)
        layers.append(layer_result(job, name, solution, time.monotonic() - started))
        job.progress.layer_done(layers[-1])
    likes = dict(job.skeleton.model.named_parameters())
    deferred = {
        name: Deferred(job.plan.rest_dtype, likes[name].shape, later[name]) for name in later
    }
    buffers = {n: tensors.pop(n) for n, _ in job.skeleton.model.named_buffers() if n in tensors}
    save_tensors(
        job.folder.part(OUTER), {**job.as_stored(tensors), **buffers, **packed, **deferred}
    )
    results = {"rotation": basis.checksum(), "layers": [asdict(layer) for layer in layers]}
    job.folder.record(OUTER, results)


def _rounded(weight_VD: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Solution:
    solutions = []
    for part_VD in weight_VD.split(ROWS_AT_ONCE):
        solutions.append(solve(part_VD, None, grid, ROUNDING, scale_dtype=scale_dtype))
        trim_memory()
    return join_rows(solutions)
