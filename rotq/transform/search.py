"""The basis of a job, by the recipe's ``transform``: as drawn, balanced or trained.

What was found is a part of the job, so that a resumed one has the same; a training that was stopped
continues from its last state on the disk.
"""

from __future__ import annotations

import time
from dataclasses import replace

from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import read_tensors
from rotq.errors import RotqError
from rotq.job.context import Job
from rotq.job.part_names import TRANSFORM
from rotq.models.scalings import scalings
from rotq.models.skeleton import Skeleton
from rotq.models.task import is_masked
from rotq.numerics import matmul_precision
from rotq.phases import phase
from rotq.recipe import Transform
from rotq.rotations.basis import Basis
from rotq.transform.methods import METHODS
from rotq.transform.windows import TrainingWindows


@phase("transform")
def search_basis(job: Job, drawn: Basis) -> Basis:
    """The basis the job is to use; what is reported is recorded under ``TRANSFORM``.

    Args:
        job: What is searched for goes into its folder.
        drawn: What ``build_basis`` made of the recipe.

    Raises:
        RotqError: the training diverged (names step and place), or the model does not allow a
            scaling.
    """
    method = job.recipe.transform.method
    if method == "fixed" and not job.recipe.transform.scalings:
        return drawn
    check_transform(job.recipe.transform, job.skeleton)
    if not job.finished(TRANSFORM):
        job.ranks.once(lambda: _search(job, drawn))
    return _restored(job, drawn)


def _search(job: Job, drawn: Basis) -> None:
    """Make the part."""
    started, method = time.monotonic(), job.recipe.transform.method
    with matmul_precision(job.recipe.calibration.precision):
        basis, results = METHODS[method](TrainingWindows(job), drawn)
    save_tensors(job.folder.part(TRANSFORM), basis.tensors())
    told = {"description": basis.description, "seconds": time.monotonic() - started}
    job.folder.record(TRANSFORM, {"method": method, **results, **told})
    job.folder.drop_states(TRANSFORM)


def check_transform(options: Transform, skeleton: Skeleton) -> None:
    """Refuse what the family does not allow, before any work.

    Raises:
        RotqError: the method or a scaling is not possible; says why.
    """
    if options.method == "fixed" and not options.scalings:
        return
    adapter = skeleton.adapter
    why = None
    if adapter.is_generic:
        why = "nothing of their blocks is known but the residual stream"
    elif not adapter.attention_norm:
        why = "no norm lies before their branches"
    if why is not None:
        raise RotqError(
            f"transform.method={options.method} is not possible for {adapter.family} models: "
            f"{why}; use method fixed without scalings"
        )
    if options.objective == "cross_entropy" and is_masked(skeleton.config):
        raise RotqError(
            f"transform.objective=cross_entropy asks for next tokens, and {adapter.family} models "
            "predict none; set transform.objective=kl_top"
        )
    if adapter.layer_norm:
        _check_layer_norm(options, adapter.family)
    scalings(skeleton, options.scalings)


def _check_layer_norm(options: Transform, family: str) -> None:
    """Refuse what looks at the inputs of single layers as RMSNorm gives them.

    Raises:
        RotqError: names the key.
    """
    for key, wanted, instead in (
        ("layer_steps", options.layer_steps, "0"),
        ("balance", options.balance, "[]"),
    ):
        if wanted:
            raise RotqError(
                f"transform.{key} is not possible for {family} models: closed forms and losses of "
                f"single layers know no LayerNorm; set transform.{key}={instead}"
            )


def _restored(job: Job, drawn: Basis) -> Basis:
    tensors = read_tensors(job.folder.part(TRANSFORM))
    description = job.results(TRANSFORM)["description"]
    return replace(drawn.with_tensors(tensors), description=description)
