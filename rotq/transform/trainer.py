"""Adam on the free parameters of a basis, whatever the loss is; stops and continues.

Warm-up and cosine decay. Step sizes are angles for matrices and relative changes for scales, so
that they mean the same for every size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import read_tensors
from rotq.errors import RotqError
from rotq.transform.parameters import Parameters

WARM_UP = 8
"""Steps of linear warm-up."""

Backward = Callable[[int], float]
"""Adds the gradients of step ``i``'s loss to the free parameters; returns the loss."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How many steps, and how large they may be."""

    steps: int
    angle: float
    """Rms angle of a matrix, radians."""
    scale_rate: float
    """Relative change of a factor."""


class Trainer:
    """Parameters, their optimizer, and the losses so far."""

    def __init__(self, parameters: Parameters, pace: Pace, backward: Backward) -> None:
        self.parameters, self.pace, self.backward = parameters, pace, backward
        groups = [
            {"params": list(parameters.rotations().values()), "rate": pace.angle},
            {"params": list(parameters.logs.values()), "rate": pace.scale_rate},
        ]
        # gradients are small numbers (a loss per token over d^2 entries), so epsilon must be too
        self.optimizer = torch.optim.Adam(
            [group for group in groups if group["params"]], lr=0.0, betas=(0.9, 0.95), eps=1e-15
        )
        self.losses: list[float] = []

    def step(self) -> float:
        """One step; returns the loss before it.

        Raises:
            RotqError: the loss or a gradient is not finite; names the step and where.
        """
        index = len(self.losses)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(index, self.pace.steps)
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = self.backward(index)
        self._check(loss, index)
        self.optimizer.step()
        self.losses.append(loss)
        return loss

    def save(self, file: Path) -> None:
        """Write all of the state, at once or not at all."""
        state = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, free in self.parameters.free().items():
            state[f"{name}.free"] = free.detach()
            state |= {f"{name}.{key}": self.optimizer.state[free][key] for key in self._kept(free)}
        save_tensors(file, state)

    def restore(self, file: Path) -> None:
        """Go on from what ``save`` has written."""
        state = read_tensors(file)
        self.losses = state["losses"].tolist()
        for name, free in self.parameters.free().items():
            with torch.no_grad():
                free.copy_(state[f"{name}.free"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{name}.{key}" in state:
                    moment = state[f"{name}.{key}"]
                    self.optimizer.state[free][key] = moment.to(
                        free.device if key != "step" else "cpu"
                    )

    def _kept(self, free: Tensor) -> list[str]:
        return list(self.optimizer.state[free])

    def _check(self, loss: float, index: int) -> None:
        if not math.isfinite(loss):
            raise RotqError(f"transform: the loss is {loss} at step {index + 1}")
        for name, free in self.parameters.free().items():
            if free.grad is not None and not torch.isfinite(free.grad).all():
                raise RotqError(
                    f"transform: the gradient of {name} is not finite at step {index + 1}"
                )


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 2 %."""
    return min(1.0, (step + 1) / WARM_UP) * (0.51 + 0.49 * math.cos(math.pi * step / steps))


def pass_on(named: dict[str, Tensor], leaves: dict[str, Tensor]) -> None:
    """Take gradients of matrices and factors through the parametrization that made them.

    Args:
        named: With their graph.
        leaves: The same without it; their gradients were summed over blocks.
    """
    reached = [name for name, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([named[n] for n in reached], [leaves[n].grad for n in reached])
