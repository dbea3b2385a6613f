"""The original model in the job's basis, block by block, under the check that it is the same."""

from __future__ import annotations

import copy
import functools

from torch import Tensor, nn

from rotq.evaluation.flatness import FlatnessChange, FlatnessMeter
from rotq.fusion.fuse import fuse_block, fuse_outer
from rotq.job.context import Job
from rotq.job.part_names import OUTER
from rotq.job.parts import restored_outer
from rotq.job.rest import round_rest
from rotq.phases import phase
from rotq.quantize.invariance import InvarianceCheck
from rotq.quantize.outer import save_outer
from rotq.rotations.basis import Basis


class RotatedModel:
    """Loads, rotates and checks; blocks are asked for in their order, after ``outer``."""

    def __init__(self, job: Job, basis: Basis) -> None:
        self.job, self.basis = job, basis
        self.check = InvarianceCheck(job, basis)
        self.meter = _flatness_meter(job, basis)

    @phase("load")
    def outer(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What lies outside the blocks, rotated: exact, and as it is stored, both without the head.

        What is stored is saved.
        """
        job = self.job
        if self.basis.is_identity and job.skeleton.own_head:
            return self._outer_as_it_is()
        original = job.skeleton.load_outer(job.source, dtype=job.dtype)
        self.check.start(original)
        if self.meter is not None:
            self.meter.start(original)
        fused = fuse_outer(original, job.skeleton.adapter, self.basis, in_place=True)
        del original
        self.check.check_embedding(fused)
        if self.meter is not None:
            self.meter.start_transformed(fused)
        if not job.finished(OUTER):
            job.ranks.once(functools.partial(save_outer, job, fused, self.basis))
        exact = self._without_head(fused)
        del fused
        stored = restored_outer(job)
        self._start_check(stored)
        return exact, self._without_head(stored)

    def _outer_as_it_is(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The same where nothing is rotated: the head is held while it is written, and alone."""
        job, head = self.job, self.job.skeleton.own_head
        exact = job.skeleton.load_outer(job.source, dtype=job.dtype, without={head})
        if self.meter is not None:
            self.meter.start(exact)
            self.meter.start_transformed(exact)

        def load_head() -> Tensor:
            names = [name for name in exact if name != head]
            found = job.skeleton.load_outer(job.source, dtype=job.dtype, without=names)
            return found[head]

        if not job.finished(OUTER):
            later = {head: load_head}
            job.ranks.once(functools.partial(save_outer, job, exact, self.basis, later))
        is_same = job.dtype == job.plan.rest_dtype and not job.plan.outer
        stored = exact if is_same else restored_outer(job, without=head)
        self._start_check(stored, without=head)
        return exact, stored

    def _start_check(self, stored: dict[str, Tensor], *, without: str = "") -> None:
        """``stored`` is in the job's dtype, without that weight; the check is in the model's."""
        job = self.job
        if job.dtype != job.plan.dtype:
            stored = restored_outer(job, without=without, dtype=job.plan.dtype)
        self.check.start_quantized(stored)

    def original_outer(self) -> dict[str, Tensor]:
        """What lies outside the blocks, rotated, head and all, before any of it is packed."""
        job = self.job
        original = job.skeleton.load_outer(job.source, dtype=job.dtype)
        fused = fuse_outer(original, job.skeleton.adapter, self.basis, in_place=True)
        return {name: tensor.to(job.device) for name, tensor in fused.items()}

    @phase("load")
    def block(self, index: int) -> tuple[nn.Module, dict[str, FlatnessChange]]:
        """A block in the job's dtype, and what the rotation did to its sites' inputs."""
        if self.basis.is_identity:
            same = self._as_stored(index, self.job.load_block(index, self.job.dtype))
            return same, {} if self.meter is None else self.meter.measure(index, same, same)
        exact = self.job.load_exact(index)
        if self.meter is None:
            return self._as_stored(index, self.check.rotate_block(index, exact)), {}
        # in two steps, as a device may not have the dtype that it is rounded from
        plain = copy.deepcopy(exact).to(self.job.dtype).to(self.job.device)
        rotated = self._as_stored(index, self.check.rotate_block(index, exact))
        return rotated, self.meter.measure(index, plain, rotated)

    @phase("load")
    def plain_block(self, index: int) -> nn.Module:
        """A block in the basis and the job's dtype, without the check; in any order."""
        if self.basis.is_identity:
            return self._as_stored(index, self.job.load_block(index, self.job.dtype))
        exact = self.job.load_exact(index)
        fuse_block(exact, self.job.skeleton.adapter, self.basis, index)
        return self._as_stored(index, exact)

    def _as_stored(self, index: int, block: nn.Module) -> nn.Module:
        """The block in the job's dtype with the values that the model's has, or what is stored."""
        block, prefix = block.to(self.job.plan.dtype), self.job.skeleton.block_name(index)
        block = block.to(self.job.dtype)
        kept = {
            name: parameter
            for name, parameter in block.named_parameters()
            if f"{prefix}.{name.removesuffix('.weight')}" not in self.job.plan.grids
        }
        round_rest(kept, self.job.plan.rest_dtype)
        return block.to(self.job.device)

    def _without_head(self, outer: dict[str, Tensor]) -> dict[str, Tensor]:
        head = f"{self.job.skeleton.adapter.head}.weight"
        return {name: tensor for name, tensor in outer.items() if name != head}


def _flatness_meter(job: Job, basis: Basis) -> FlatnessMeter | None:
    """None where flatness does not matter: nothing is rotated or rounded at run time.

    The leader alone measures it.
    """
    rounded = job.plan.inputs is not None or job.plan.kv is not None
    if not job.ranks.leads or (basis.is_identity and not rounded):
        return None
    return FlatnessMeter(
        job.skeleton,
        job.windows.each(),
        device=job.device,
        precision=job.recipe.calibration.precision,
    )
