"""Ways to come to a basis, each a function of the setting and of what was drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from rotq.job.folder import TRANSFORM
from rotq.rotations.basis import Basis
from rotq.transform import model_loss as through_model
from rotq.transform import optrot
from rotq.transform.balance import Balancer
from rotq.transform.layer_loss import ANGLE, SCALE_RATE, LayerError
from rotq.transform.parameters import Parameters, movement
from rotq.transform.trainer import Backward, Pace, Trainer
from rotq.transform.windows import Setting

Found = tuple[Basis, dict[str, Any]]
"""A basis, and what is to be reported about it."""

SAVE_EVERY = 16
"""Steps between two states on the disk that a stopped job continues from."""


def without_rotation(setting: Setting, drawn: Basis) -> Found:
    """Neither R1 nor R2; what is applied online stays."""
    online = {k: text for k, text in drawn.description.items() if k not in ("residual", "value")}
    return replace(drawn.with_tensors({}), description=online), {}


def as_drawn(setting: Setting, drawn: Basis) -> Found:
    """What the recipe's ``rotation`` says."""
    return drawn, {}


def balanced(setting: Setting, drawn: Basis) -> Found:
    """Scales in closed form, rotations as drawn."""
    return _found(_start(setting, drawn), drawn, "balanced", {})


def optrot_trained(setting: Setting, drawn: Basis) -> Found:
    """Trained on the fourth powers of the weights."""
    options = setting.options
    parameters = _parameters(setting, drawn, {}, scaled=())
    backward = functools.partial(
        optrot.backward, setting.skeleton, setting.source, parameters, device=setting.device
    )
    pace = Pace(steps=options.steps, angle=options.angle, scale_rate=options.scale_rate)
    figures = _train(setting, "optrot", Trainer(parameters, pace, backward))
    return _found(parameters, drawn, "optrot", {"optrot": figures})


def learned(setting: Setting, drawn: Basis) -> Found:
    """Closed form, then trained on single layers, then on windows, as far as asked for."""
    options, figures = setting.options, {}
    parameters = _start(setting, drawn)
    if options.layer_steps:
        error = LayerError(
            skeleton=setting.skeleton,
            source=setting.source,
            plan=setting.plan,
            damping=setting.recipe.solver.damping,
            folds_gains=drawn.residual_DD is not None,
            device=setting.device,
        )
        error.measure(setting.embedded())
        pace = Pace(steps=options.layer_steps, angle=ANGLE, scale_rate=SCALE_RATE)
        trainer = Trainer(parameters, pace, functools.partial(error.backward, parameters))
        figures["layers"] = _train(setting, "layers", trainer)
        parameters = _parameters(setting, *parameters.restart(), scaled=options.scalings)
    if options.steps:
        pace = Pace(steps=options.steps, angle=options.angle, scale_rate=options.scale_rate)
        trainer = Trainer(parameters, pace, _on_windows(setting, parameters))
        figures["model"] = _train(setting, "model", trainer)
    return _found(parameters, drawn, "learned", figures)


def _on_windows(setting: Setting, parameters: Parameters) -> Backward:
    """The recipe's objective on one window per step."""
    student, outer = setting.student, setting.outer
    lessons = setting.lessons(setting.training_windows[: setting.options.steps])

    def backward(step: int) -> float:
        lesson = lessons[step % len(lessons)]
        return through_model.backward(student, parameters, outer, lesson, step)

    return backward


CANDIDATES: Mapping[str, Callable[[Setting, Basis], Found]] = {
    "none": without_rotation,
    "hadamard": as_drawn,
    "fixed": balanced,
    "optrot": optrot_trained,
    "learned": learned,
}


def _start(setting: Setting, drawn: Basis) -> Parameters:
    """The closed form of what the recipe balances, else as drawn."""
    options = setting.options
    factors: dict[str, Tensor] = {}
    if options.balance:
        balancer = Balancer(skeleton=setting.skeleton, source=setting.source, device=setting.device)
        squares = balancer.measure(setting.embedded())
        factors = balancer.scales(squares, drawn, options.balance)
    return _parameters(setting, drawn, factors, scaled=options.scalings)


def _parameters(
    setting: Setting, start: Basis, factors: Mapping[str, Tensor], scaled: Sequence[str]
) -> Parameters:
    return Parameters(
        start,
        setting.skeleton,
        scaled=scaled,
        factors=factors,
        butterfly=setting.options.down == "butterfly",
        device=setting.device,
    )


def _train(setting: Setting, name: str, trainer: Trainer) -> dict[str, Any]:
    """Run a trainer to its end, from its last state if there is one; returns its losses."""
    steps = trainer.pace.steps
    state = setting.job.part(f"{TRANSFORM}-{name}")
    if state.exists():
        trainer.restore(state)
    while len(trainer.losses) < steps:
        loss = trainer.step()
        done = len(trainer.losses)
        setting.progress.transform_step(name, done - 1, steps, loss)
        if done % SAVE_EVERY == 0 or done == steps:
            trainer.save(state)
    quarter = max(1, steps // 4)
    return {
        "steps": steps,
        "loss_first_quarter": sum(trainer.losses[:quarter]) / quarter,
        "loss_last_quarter": sum(trainer.losses[-quarter:]) / quarter,
    }


def _found(parameters: Parameters, drawn: Basis, name: str, figures: dict[str, Any]) -> Found:
    basis, words = parameters.finished(), dict(drawn.description)
    found = ["residual", "value"]
    if basis.down_angles is not None:
        found.append("down")
        words["down"] = words["down"].replace("hadamard", "butterfly")
    words |= {key: f"{words[key]}, {name}" for key in found if key in words}
    return replace(basis, description=words), {**figures, **movement(drawn, basis)}
