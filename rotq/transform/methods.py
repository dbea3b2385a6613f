"""Ways to come to a basis, each a function of the windows and of what was drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from rotq.job.context import Job
from rotq.job.part_names import TRANSFORM
from rotq.report import quarters
from rotq.rotations.basis import Basis
from rotq.transform import model_loss, optrot
from rotq.transform.balance import Balancer
from rotq.transform.layer_loss import ANGLE, SCALE_RATE, LayerLoss
from rotq.transform.parameters import Parameters, movement
from rotq.transform.trainer import Backward, Pace, Trainer
from rotq.transform.windows import TrainingWindows

Found = tuple[Basis, dict[str, Any]]
"""A basis, and what is to be reported about it."""

SAVE_EVERY = 16
"""Steps between two states on the disk that a stopped job continues from."""


def balanced(windows: TrainingWindows, drawn: Basis) -> Found:
    """Scales in closed form, rotations as drawn."""
    return _found(_start(windows, drawn), drawn, "balanced", {})


def optrot_trained(windows: TrainingWindows, drawn: Basis) -> Found:
    """Trained on the fourth powers of the weights."""
    job, options = windows.job, windows.job.recipe.transform
    parameters = _parameters(job, drawn, {}, scaled=())
    backward = functools.partial(optrot.backward, job, parameters)
    pace = Pace(steps=options.steps, angle=options.angle, scale_rate=options.scale_rate)
    figures = _train(job, "optrot", Trainer(parameters, pace, backward))
    return _found(parameters, drawn, "optrot", {"optrot": figures})


def learned(windows: TrainingWindows, drawn: Basis) -> Found:
    """Closed form, then trained on single layers, then on windows, as far as asked for."""
    job, options, figures = windows.job, windows.job.recipe.transform, {}
    parameters = _start(windows, drawn)
    if options.layer_steps:
        loss = LayerLoss(job=job, folds_gains=drawn.residual_DD is not None)
        loss.measure(windows.embedded())
        pace = Pace(steps=options.layer_steps, angle=ANGLE, scale_rate=SCALE_RATE)
        trainer = Trainer(parameters, pace, functools.partial(loss.backward, parameters))
        figures["layers"] = _train(job, "layers", trainer)
        parameters = _parameters(job, *parameters.restart(), scaled=options.scalings)
    if options.steps:
        pace = Pace(steps=options.steps, angle=options.angle, scale_rate=options.scale_rate)
        trainer = Trainer(parameters, pace, _on_windows(windows, parameters))
        figures["model"] = _train(job, "model", trainer)
    return _found(parameters, drawn, "learned", figures)


def _on_windows(windows: TrainingWindows, parameters: Parameters) -> Backward:
    """The recipe's objective on one window per step."""
    student, outer = windows.student, windows.outer
    lessons = windows.lessons(windows.trained_on[: windows.job.recipe.transform.steps])

    def backward(step: int) -> float:
        lesson = lessons[step % len(lessons)]
        return model_loss.backward(student, parameters, outer, lesson, step)

    return backward


METHODS: Mapping[str, Callable[[TrainingWindows, Basis], Found]] = {
    "fixed": balanced,
    "optrot": optrot_trained,
    "learned": learned,
}


def _start(windows: TrainingWindows, drawn: Basis) -> Parameters:
    """The closed form of what the recipe balances, else as drawn."""
    job, options = windows.job, windows.job.recipe.transform
    factors: dict[str, Tensor] = {}
    if options.balance:
        balancer = Balancer(job)
        squares = balancer.measure(windows.embedded())
        factors = balancer.scales(squares, drawn, options.balance)
    return _parameters(job, drawn, factors, scaled=options.scalings)


def _parameters(
    job: Job, start: Basis, factors: Mapping[str, Tensor], scaled: Sequence[str]
) -> Parameters:
    return Parameters(
        start,
        job.skeleton,
        scaled=scaled,
        factors=factors,
        device=job.device,
    )


def _train(job: Job, name: str, trainer: Trainer) -> dict[str, Any]:
    """Run a trainer to its end, from its last state if there is one; returns its losses."""
    steps, part = trainer.pace.steps, f"{TRANSFORM}-{name}"
    if job.folder.finished(part):
        trainer.restore(job.folder.part(job.folder.results(part)["state"]))
    while len(trainer.losses) < steps:
        loss = trainer.step()
        done = len(trainer.losses)
        job.progress.transform_step(name, done - 1, steps, loss)
        if done % SAVE_EVERY == 0 or done == steps:
            # a name of its own: the state before it stays until this one is on record
            state = f"{part}-{done:05d}"
            trainer.save(job.folder.part(state))
            job.folder.record(part, {"state": state}, [state])
    first, last = quarters(trainer.losses)
    return {"steps": steps, "loss_first_quarter": first, "loss_last_quarter": last}


def _found(parameters: Parameters, drawn: Basis, name: str, figures: dict[str, Any]) -> Found:
    basis, words = parameters.finished(), dict(drawn.description)
    words |= {key: f"{words[key]}, {name}" for key in ("residual", "value") if key in words}
    return replace(basis, description=words), {**figures, **movement(drawn, basis)}
