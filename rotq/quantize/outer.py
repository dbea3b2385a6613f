"""Embedding and head rounded, and the part of the job with all that lies outside the blocks.

    W^ = q s,    scales searched for the least sum |W - W^|^2.4 of each group

No data is looked at: a row of the table is read for its token alone, and its error is what that
token's hidden states begin with. (GPTQ on the head is not tried.)

Shape suffixes: V vocabulary, D hidden size.
"""

from __future__ import annotations

import time
from dataclasses import asdict

import torch
from torch import Tensor

from rotq.checkpoint.export import packed_tensors
from rotq.checkpoint.shards import save_tensors
from rotq.formats.integer import Grid
from rotq.job.context import Job
from rotq.job.part_names import OUTER
from rotq.job.rest import rest_in
from rotq.memory import trim_memory
from rotq.phases import phase
from rotq.quantize.quantized_block import layer_result
from rotq.recipe import Solver
from rotq.rotations.basis import Basis
from rotq.solvers.solve import Solution, join_rows, solve

ROUNDING = Solver(method="rtn", scale_search="mse")

ROWS_AT_ONCE = 1024
"""Of a table, in fp32; what was tried on them is given back before the next."""


@phase("packing")
def save_outer(job: Job, fused: dict[str, Tensor], basis: Basis) -> None:
    """Write the part: what the plan says packed, and the rest as the plan stores it.

    Args:
        fused: Tensors outside the blocks, in the basis; a tied head may be missing.
    """
    tensors, layers = dict(fused), []
    for name, grid in job.plan.outer.items():
        started = time.monotonic()
        solution = _rounded(tensors.pop(f"{name}.weight"), grid, job.plan.scale_dtype)
        tensors |= packed_tensors(name, solution.quantized)
        layers.append(layer_result(job, name, solution, time.monotonic() - started))
        job.progress.layer_done(layers[-1])
    save_tensors(job.folder.part(OUTER), rest_in(tensors, job.plan.rest_dtype))
    results = {"rotation": basis.checksum(), "layers": [asdict(layer) for layer in layers]}
    job.folder.record(OUTER, results)


def _rounded(weight_VD: Tensor, grid: Grid, scale_dtype: torch.dtype) -> Solution:
    solutions = []
    for part_VD in weight_VD.split(ROWS_AT_ONCE):
        solutions.append(solve(part_VD.float(), None, grid, ROUNDING, scale_dtype=scale_dtype))
        trim_memory()
    return join_rows(solutions)
