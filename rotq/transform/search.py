"""The basis of a job, by the recipe's ``transform``: as drawn, trained, or the best of several.

What was found is a part of the job, so that a resumed one has the same; a training that was stopped
continues from its last state on the disk.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import read_tensor
from rotq.errors import RotqError
from rotq.job.folder import TRANSFORM, JobFolder
from rotq.numerics import matmul_precision
from rotq.rotations.basis import Basis
from rotq.transform.methods import CANDIDATES, Found
from rotq.transform.model_loss import mean_loss
from rotq.transform.proxy import Judge
from rotq.transform.windows import JUDGED_WINDOWS, Setting


def find_basis(setting: Setting, drawn: Basis) -> Basis:
    """The basis the job is to use; what is reported is recorded under ``TRANSFORM``.

    Args:
        setting: Its source has the adapter's names.
        drawn: What ``build_basis`` made of the recipe.

    Raises:
        RotqError: the training diverged (names step and place), or the model does not allow a
            scaling.
    """
    job, method = setting.job, setting.options.method
    if method == "fixed" and not setting.options.scalings:
        return drawn
    if setting.skeleton.adapter.layer_norm:
        raise RotqError(
            f"transform.method={method} is not possible for {setting.skeleton.adapter.family} "
            "models: their R1 has to leave the all-ones direction alone; use method fixed"
        )
    if job.finished(TRANSFORM):
        return _restored(job, drawn)
    started = time.monotonic()
    with matmul_precision(setting.recipe.calibration.precision):
        find = _choose if method == "auto" else CANDIDATES[method]
        basis, results = find(setting, drawn)
    save_tensors(job.part(TRANSFORM), basis.tensors())
    told = {"description": basis.description, "seconds": time.monotonic() - started}
    job.record(TRANSFORM, {"method": method, **results, **told})
    return _restored(job, drawn)


def _restored(job: JobFolder, drawn: Basis) -> Basis:
    tensors = {entry.name: read_tensor(entry) for entry in read_entries(job.part(TRANSFORM))}
    description = job.results(TRANSFORM)["description"]
    return replace(drawn.with_tensors(tensors), description=description)


def _choose(setting: Setting, drawn: Basis) -> Found:
    """Make every candidate, score all, keep the best."""
    made: dict[str, Found] = {
        name: CANDIDATES[name](setting, drawn) for name in setting.options.candidates
    }
    scores = _scores(setting, {name: basis for name, (basis, _) in made.items()})
    best = min(scores, key=scores.__getitem__)
    judge = setting.options.judge
    told = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
    setting.progress.message(f"transform: {best} by {judge} ({told})")
    candidates = {name: figures for name, (_, figures) in made.items()}
    return made[best][0], {
        "judge": judge,
        "scores": scores,
        "chosen": best,
        "candidates": candidates,
    }


def _scores(setting: Setting, bases: Mapping[str, Basis]) -> dict[str, float]:
    if setting.options.judge == "kl":
        lessons = setting.lessons(setting.windows[-JUDGED_WINDOWS:])
        student = replace(setting.student, rounds_weights=True)
        return {
            name: mean_loss(student, basis, setting.outer, lessons) for name, basis in bases.items()
        }
    judge = Judge(
        skeleton=setting.skeleton,
        source=setting.source,
        plan=setting.plan,
        activations=setting.plan.inputs,
        damping=setting.recipe.solver.damping,
        device=setting.device,
    )
    return judge.scores(bases, setting.embedded())
