"""What a job will cost, before any weight is loaded: bits, bytes on the disk, memory, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import nn

from rotq.checkpoint.location import ModelName
from rotq.formats.integer import Grid
from rotq.job.plan import Plan, make_plan
from rotq.memory import available_memory, resident_memory
from rotq.models.skeleton import Skeleton
from rotq.quantize.job_seconds import check_counted, job_seconds
from rotq.quantize.peak_memory import peak_memory
from rotq.quantize.rates import measure_rates
from rotq.quantize.scratch_disk import scratch_bytes, stream_bytes
from rotq.quantize.setup import Settled, settle_described
from rotq.recipe import Recipe
from rotq.report import Estimate, SiteEstimate
from rotq.report.lines import larger_line, size

IMPORTED_BYTES = 400_000_000
"""Resident memory of a process that has imported torch and transformers, where none is measured."""

SHARED = ("forward passes", "moments", "solving", "tuning")
"""Phases that processes share. Threads share these and the factors."""


def estimate(
    model: ModelName,
    recipe: Recipe,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    processes: int = 1,
) -> Estimate:
    """What ``quantize_model`` would make and need; no weight is read.

    Calibration windows are drawn and dropped, so that a text is refused here as in the job. On a
    CPU its speed is measured for some seconds.

    Raises:
        ValueError, RotqError: as ``quantize_model``, before its first block.
    """
    settled = settle_described(
        model, recipe, device=device, dtype=dtype, trust_remote_code=trust_remote_code
    )
    skeleton, plan, source = settled.skeleton, settled.plan, settled.source
    seconds: dict[str, float] = {}
    note = f"time is predicted on CPUs, not on {settled.device}"
    if settled.device.type == "cpu":
        seconds, note = _seconds(settled, recipe)
    base = resident_memory() or IMPORTED_BYTES

    def made(changed: Recipe, number: int) -> Estimate:
        return make_estimate(
            skeleton, changed, settled.dtype, plan.rest_dtype, base=base, processes=number
        )

    found = made(recipe, processes)
    larger = larger_line(found.output_bytes, source.quantized_bytes, is_packed=bool(plan.outer))
    notes = [larger, note]
    if settled.device.type == "cpu":
        notes += _advice(made, recipe, processes, available_memory())
    return replace(
        found,
        seconds=seconds,
        wall_seconds=_wall(seconds, processes),
        notes=tuple(filter(None, notes)),
    )


def make_estimate(
    skeleton: Skeleton,
    recipe: Recipe,
    dtype: torch.dtype,
    rest_dtype: torch.dtype | None = None,
    *,
    base: int = IMPORTED_BYTES,
    processes: int = 1,
) -> Estimate:
    """Bits, bytes and peak memory of a job; nothing but the config is read.

    Args:
        dtype, rest_dtype: As for ``make_plan``.
        base: Bytes of each process before the first block.
        processes: That share the job; each has a part of the streams.
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
    threads = max(1, torch.get_num_threads() // processes)
    steps = peak_memory(skeleton, recipe, plan, dtype, threads)
    held = 0 if recipe.calibration.offload else stream_bytes(skeleton, recipe, dtype)
    return Estimate(
        sites=(*sites, *outer),
        bits_per_weight=packed_bits / max(planned, 1),
        output_bytes=output_bytes,
        peak_memory_bytes=processes * (base + max(steps.values())) + held,
        memory_steps={"the process itself": base, "streams": held} | steps,
        scratch_disk_bytes=2 * output_bytes + scratch_bytes(skeleton, recipe, plan, dtype),
        limits=plan.limits,
    )


def _seconds(settled: Settled, recipe: Recipe) -> tuple[dict[str, float], str]:
    """Of one processor by phase, and a line that says how they were found, or why not."""
    plan, skeleton = settled.plan, settled.skeleton
    started = time.monotonic()
    try:
        check_counted(recipe)
    except ValueError as error:
        return {}, str(error)
    name = max(plan.grids, key=lambda name: prod(plan.shapes[name]))
    rates = measure_rates(
        recipe, plan.grids[name], plan.shapes[name], settled.dtype, plan.scale_dtype
    )
    source_bytes = sum(entry.num_bytes for entry in settled.source.entries.values())
    made = make_estimate(skeleton, recipe, settled.dtype, plan.rest_dtype)
    found = job_seconds(
        skeleton,
        recipe,
        plan,
        rates,
        source_bytes=source_bytes,
        output_bytes=made.output_bytes,
    )
    spent = time.monotonic() - started
    return found, f"time is predicted from {spent:.0f} s of measurements on this machine"


def _wall(seconds: dict[str, float], processes: int) -> float | None:
    """Seconds that pass if the processors do nothing else."""
    if not seconds:
        return None
    threads = max(1, torch.get_num_threads() // processes)
    shared = sum(seconds.get(phase, 0.0) for phase in SHARED) / (threads * processes)
    rest = sum(spent for phase, spent in seconds.items() if phase not in (*SHARED, "factor"))
    return shared + seconds.get("factor", 0.0) / threads + rest


def _advice(
    made: Callable[[Recipe, int], Estimate], recipe: Recipe, processes: int, free: int | None
) -> Iterator[str]:
    """What to change where memory is short; nothing where it is not.

    Args:
        made: Of a recipe and a number of processes.
        free: Bytes; None where that is not known.
    """
    needed = made(recipe, processes).peak_memory_bytes
    if free is None or needed <= free:
        return
    yield f"it needs {size(needed)} of memory, and {size(free)} are free"
    calibration, least = recipe.calibration, recipe
    changes: dict[str, Any] = {"offload": True, "batch_size": 1}
    for key, value in changes.items():
        changed = replace(recipe, calibration=replace(calibration, **{key: value}))
        saved = needed - made(changed, processes).peak_memory_bytes
        if saved > 0:
            yield f"calibration.{key}={str(value).lower()} saves {size(saved)}"
    if processes > 1:
        saved = needed - made(recipe, 1).peak_memory_bytes
        yield f"--num-processes 1 saves {size(saved)}"
    least = replace(recipe, calibration=replace(calibration, **changes))
    lowest = made(least, 1)
    if lowest.peak_memory_bytes > free:
        steps = lowest.memory_steps
        step = max(list(steps)[2:], key=steps.__getitem__)
        yield f"with all of that it still needs {size(lowest.peak_memory_bytes)}, for {step}"


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
