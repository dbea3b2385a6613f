"""The basis of a job, by the recipe's ``transform``: as drawn, trained, or the best of several.

What was found is a part of the job, so that a resumed one has the same; a training that was stopped
continues from its last state on the disk.

Shape suffixes: B windows, T positions, D hidden size.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import read_tensor
from rotq.job import TRANSFORM, Job
from rotq.models.skeleton import Skeleton
from rotq.models.tensors import TensorSource
from rotq.plan import Plan
from rotq.precision import matmul_precision
from rotq.recipe import Recipe, Transform
from rotq.report import Progress
from rotq.rotations.basis import Basis
from rotq.transform import optrot, through_model
from rotq.transform.balance import Balancer
from rotq.transform.parameters import Parameters, movement
from rotq.transform.proxy import Judge
from rotq.transform.student import Student
from rotq.transform.teacher import next_tokens
from rotq.transform.through_model import Lesson, mean_loss, teach
from rotq.transform.train import Backward, Trainer

JUDGED_WINDOWS = 4
"""Windows of the calibration text that ``judge: kl`` scores on; they are not trained on."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the search works on."""

    job: Job
    skeleton: Skeleton
    source: TensorSource
    plan: Plan
    recipe: Recipe
    windows: Sequence[Tensor]
    """(1, T) calibration tokens each."""
    device: torch.device
    dtype: torch.dtype
    progress: Progress

    @property
    def options(self) -> Transform:
        return self.recipe.transform

    @functools.cached_property
    def outer(self) -> dict[str, Tensor]:
        """The original model's tensors outside the blocks."""
        return self.skeleton.load_outer(self.source, dtype=self.dtype, device=self.device)

    @functools.cached_property
    def student(self) -> Student:
        return Student(
            skeleton=self.skeleton,
            source=self.source,
            plan=self.plan,
            device=self.device,
            dtype=self.dtype,
            rounds_weights=self.plan.inputs is None,
        )


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
    if job.finished(TRANSFORM):
        return _restored(job, drawn)
    started = time.monotonic()
    with matmul_precision(setting.recipe.calibration.precision):
        if method == "auto":
            basis, results = _choose(setting, drawn)
        else:
            basis, results = CANDIDATES[method](setting, drawn)
            results = {"method": method, **results}
    save_tensors(job.part(TRANSFORM), basis.tensors())
    seconds = time.monotonic() - started
    job.record(TRANSFORM, {**results, "description": basis.description, "seconds": seconds})
    return _restored(job, drawn)


def _restored(job: Job, drawn: Basis) -> Basis:
    tensors = {entry.name: read_tensor(entry) for entry in read_entries(job.part(TRANSFORM))}
    description = job.results(TRANSFORM)["description"]
    return replace(drawn.with_tensors(tensors), description=description)


Found = tuple[Basis, dict[str, Any]]
"""A basis, and what is to be reported about it."""


def _none(setting: Setting, drawn: Basis) -> Found:
    """Neither R1 nor R2; what is applied online stays."""
    kept = {
        key: text for key, text in drawn.description.items() if key not in ("residual", "value")
    }
    return replace(drawn.with_tensors({}), description=kept), {}


def _as_drawn(setting: Setting, drawn: Basis) -> Found:
    return drawn, {}


def _balanced(setting: Setting, drawn: Basis) -> Found:
    """R1 and scales in closed form."""
    start = _start(setting, drawn)
    basis = _parameters(setting, *start, scaled=setting.options.scalings).finished()
    return basis, movement(drawn, basis)


def _optrot(setting: Setting, drawn: Basis) -> Found:
    parameters = _parameters(setting, drawn, {}, scaled=())
    backward = functools.partial(
        optrot.backward, setting.skeleton, setting.source, parameters, device=setting.device
    )
    return _trained(setting, drawn, "optrot", parameters, backward)


def _learned(setting: Setting, drawn: Basis) -> Found:
    start = _start(setting, drawn)
    parameters = _parameters(setting, *start, scaled=setting.options.scalings)
    windows = _training_windows(setting)[: setting.options.steps]
    lessons = _lessons(setting, windows)

    def backward(step: int) -> float:
        lesson = lessons[step % len(lessons)]
        return through_model.backward(setting.student, parameters, setting.outer, lesson, step)

    return _trained(setting, drawn, "learned", parameters, backward)


CANDIDATES: Mapping[str, Callable[[Setting, Basis], Found]] = {
    "none": _none,
    "hadamard": _as_drawn,
    "fixed": _balanced,
    "optrot": _optrot,
    "learned": _learned,
}


def _choose(setting: Setting, drawn: Basis) -> Found:
    """Make every candidate, score all, keep the best."""
    made: dict[str, Found] = {
        name: CANDIDATES[name](setting, drawn) for name in setting.options.candidates
    }
    bases = {name: basis for name, (basis, _) in made.items()}
    scores = _scores(setting, bases)
    best = min(scores, key=scores.__getitem__)
    judge = setting.options.judge
    told = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
    setting.progress.message(f"transform: {best} by {judge} ({told})")
    results = {"method": "auto", "judge": judge, "scores": scores, "chosen": best}
    return bases[best], {
        **results,
        "candidates": {name: found for name, (_, found) in made.items()},
    }


def _scores(setting: Setting, bases: Mapping[str, Basis]) -> dict[str, float]:
    if setting.options.judge == "proxy":
        judge = Judge(
            skeleton=setting.skeleton,
            source=setting.source,
            plan=setting.plan,
            activations=setting.plan.inputs,
            damping=setting.recipe.solver.damping,
            device=setting.device,
        )
        return judge.scores(bases, [hidden_BTD.float() for hidden_BTD in _embedded(setting)])
    lessons = _lessons(setting, setting.windows[-JUDGED_WINDOWS:])
    student = replace(setting.student, rounds_weights=True)
    return {
        name: mean_loss(student, basis, setting.outer, lessons) for name, basis in bases.items()
    }


def _training_windows(setting: Setting) -> Sequence[Tensor]:
    """All but those that ``judge: kl`` needs, cut to the length that is trained on."""
    options = setting.options
    held_out = JUDGED_WINDOWS if (options.method, options.judge) == ("auto", "kl") else 0
    windows = setting.windows[: len(setting.windows) - held_out]
    return [ids_BT[:, : options.seq_len or None] for ids_BT in windows]


def _embedded(setting: Setting) -> list[Tensor]:
    return [
        setting.skeleton.embed(setting.outer, ids_BT.to(setting.device))
        for ids_BT in _training_windows(setting)
    ]


def _lessons(setting: Setting, windows: Sequence[Tensor]) -> list[Lesson]:
    if setting.options.objective == "cross_entropy":
        targets = [next_tokens(ids_BT[0]) for ids_BT in windows]
    else:
        targets = teach(setting.student, setting.outer, windows, setting.options.top_k)
    return [
        Lesson(ids_BT=ids_BT, targets=target)
        for ids_BT, target in zip(windows, targets, strict=True)
    ]


def _start(setting: Setting, drawn: Basis) -> tuple[Basis, dict[str, Tensor]]:
    """Where training starts: the closed form of what the recipe balances, else as drawn."""
    balance = setting.options.balance
    if not balance:
        return drawn, {}
    balancer = Balancer(
        skeleton=setting.skeleton, source=setting.source, device=setting.device, dtype=setting.dtype
    )
    squares = balancer.measure(_embedded(setting))
    if "residual" in balance and drawn.residual_DD is not None:
        R_DD = balancer.residual(squares, setting.recipe.rotation.seed)
        drawn = drawn.with_tensors({**drawn.tensors(), "residual": R_DD})
    scaled = [name for name in balance if name != "residual"]
    return drawn, balancer.scales(squares, drawn, scaled)


def _parameters(
    setting: Setting, start: Basis, factors: Mapping[str, Tensor], scaled: Sequence[str]
) -> Parameters:
    return Parameters(
        start,
        setting.skeleton,
        scaled=scaled,
        factors=factors,
        parametrization=setting.options.parametrization,
        device=setting.device,
    )


def _trained(
    setting: Setting, drawn: Basis, name: str, parameters: Parameters, backward: Backward
) -> Found:
    """Run the trainer to its end, from its last state if there is one."""
    options = setting.options
    trainer = Trainer(parameters, options, backward)
    state = setting.job.part(f"{TRANSFORM}-{name}-state")
    if state.exists():
        trainer.restore(state)
    while len(trainer.losses) < options.steps:
        loss = trainer.step()
        done = len(trainer.losses)
        setting.progress.transform_step(name, done - 1, options.steps, loss)
        if done % options.save_every == 0 or done == options.steps:
            trainer.save(state)
    basis = parameters.finished()
    words = {key: f"{text}, {name}" for key, text in basis.description.items() if key != "down"}
    quarter = max(1, options.steps // 4)
    return replace(basis, description={**basis.description, **words}), {
        "steps": options.steps,
        "loss_first_quarter": sum(trainer.losses[:quarter]) / quarter,
        "loss_last_quarter": sum(trainer.losses[-quarter:]) / quarter,
        **movement(drawn, basis),
    }
