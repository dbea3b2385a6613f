"""Sections of a recipe about what is trained: the basis before rounding, scales behind it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rotq.recipe.sections import check


def check_count(name: str, number: int) -> None:
    """Raise ValueError for a number of steps or tokens that no job has."""
    check(name, number, 0 <= number <= 10**9, "0 to 10^9")


@dataclass(frozen=True, kw_only=True)
class Transform:
    """How the rotations are found, and scalings between layers with them."""

    method: Literal["fixed", "optrot", "learned"] = "fixed"
    """As drawn; by the weights' fourth powers, without data (OptRot, arXiv 2512.24124); or
    trained through the model with rounding faked (OSTQuant, arXiv 2501.13987)."""
    scalings: tuple[Literal["qkv", "gate_up", "value", "query_key", "up"], ...] = ()
    """Between norm and q/k/v, norm and gate/up, v and o, q and k, up and down."""
    balance: tuple[Literal["qkv", "gate_up", "value", "query_key", "up"], ...] = ()
    """Of the scalings: those that start at their closed form instead of at one."""
    objective: Literal["kl_top", "cross_entropy"] = "kl_top"
    """Of ``steps``: KL on the likely tokens of the original model, or the text (SpinQuant)."""
    top_k: int = 1000
    """Likely tokens per position."""
    layer_steps: int = 0
    """Of ``learned``: steps on the expected error of single layers, before those through the
    model; each looks at some blocks."""
    steps: int = 64
    """Steps of Adam; ``learned`` takes one window per step, ``optrot`` some blocks' weights."""
    angle: float = 0.02
    """Rms angle in radians that a step turns a matrix by, at most."""
    scale_rate: float = 0.02
    """Relative change of a scale per step, at most."""
    seq_len: int = 0
    """Tokens from the start of a calibration window that are trained on; 0 takes the window."""

    def __post_init__(self) -> None:
        check("top_k", self.top_k, 1 <= self.top_k <= 10**9, "1 to 10^9")
        for name in ("layer_steps", "steps", "seq_len"):
            check_count(name, getattr(self, name))
        check("angle", self.angle, 0 <= self.angle <= math.pi, "0 to pi")
        check("scale_rate", self.scale_rate, 0 <= self.scale_rate <= 1, "0 to 1")
        among = set(self.balance) <= set(self.scalings)
        check("balance", self.balance, among, "among the scalings")
        for name in ("scalings", "balance"):
            names = getattr(self, name)
            check(name, names, len(set(names)) == len(names), "without repetition")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """After all blocks: train scales, norm gains and biases on the KL to the original model."""

    steps: int = 0
    """Steps of Adam; 0 leaves everything as solved."""
    learning_rate: float = 0.003
    """Relative change of a scale, or of a vector against its rms, per step."""
    windows: int = 1
    """Calibration windows of a step; processes that share a job share them."""
    seq_len: int = 0
    """Tokens from the start of a window that are trained on; 0 takes the window. Masked language
    models, which see both sides, are always given the window."""
    code_steps: int = 0
    """Before that, after each block is solved: steps of Adam on its codes and scales, each on one
    calibration window, towards the original block's output; 0 leaves the codes as solved."""
    code_rate: float = 0.03
    """Largest change of a code per step, in codes; it falls to 0 linearly."""
    scale_rate: float = 0.001
    """The same for scales, relative, while codes are trained."""

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "code_steps"):
            check_count(name, getattr(self, name))
        check("windows", self.windows, 1 <= self.windows <= 10**6, "1 to 10^6")
        for name in ("code_rate", "scale_rate"):
            value = getattr(self, name)
            check(name, value, 0 <= value <= 1, "0 to 1")
        rate = self.learning_rate
        check("learning_rate", rate, 0 < rate <= 1, "above 0, at most 1")
