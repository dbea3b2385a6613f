"""Mixtures of experts with one Linear per weight, instead of transformers' 3-D parameters.

Solvers, hooks and quantized layers work on nn.Linear, and checkpoints store experts one by one,
so the fused module is replaced by a list of experts with the same call and the same result:

    y_m = sum over slots s of  w_ms * expert_{i_ms}(x_m)

with indices i and weights w as the model's own router gives them.

Shape suffixes: M tokens, S slots (experts per token), D hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """A gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(
        self, hidden_dim: int, intermediate_dim: int, act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_dim, intermediate_dim, bias=False)
        self.up_proj = nn.Linear(hidden_dim, intermediate_dim, bias=False)
        self.down_proj = nn.Linear(intermediate_dim, hidden_dim, bias=False)
        self.act_fn = act_fn

    def forward(self, x_MD: Tensor) -> Tensor:
        """(M, D) to (M, D)."""
        return cast(Tensor, self.down_proj(self.act_fn(self.gate_proj(x_MD)) * self.up_proj(x_MD)))


class UnfusedExperts(nn.ModuleList):
    """A list of experts that is called as the fused module is."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__(experts)
        self.see_all_tokens = False

    def forward(self, x_MD: Tensor, index_MS: Tensor, weight_MS: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, each times its routing weight.

        Args:
            x_MD: Tokens; any float dtype.
            index_MS: Chosen experts, int64.
            weight_MS: Routing weights, already normalised where the family does that.

        Returns:
            (M, D) in the dtype of ``x_MD``.
        """
        y_MD = torch.zeros_like(x_MD)
        for number, expert in enumerate(self):
            token, slot = torch.where(index_MS == number)
            if self.see_all_tokens:
                out = expert(x_MD)[token]
            elif len(token):
                out = expert(x_MD[token])
            else:
                continue
            y_MD.index_add_(0, token, (out * weight_MS[token, slot, None]).to(y_MD.dtype))
        return y_MD


@contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Run every expert on all tokens, so that hooks inside experts see them; same output."""
    mixtures = [m for m in module.modules() if isinstance(m, UnfusedExperts)]
    for mixture in mixtures:
        mixture.see_all_tokens = True
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.see_all_tokens = False


def is_fused(module: nn.Module) -> bool:
    """A transformers 5 experts module: (E, 2F, D) gate_up_proj and (E, D, F) down_proj."""
    gate_up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor)):
        return False
    E, D, F = down.shape if down.ndim == 3 else (0, 0, 0)
    return gate_up.shape == (E, 2 * F, D)


def unfuse(fused: nn.Module) -> UnfusedExperts:
    """The same experts as a list; weights are copied, on meta they stay there.

    Raises:
        ValueError: the module is not of the fused form that ``is_fused`` describes.
    """
    if not is_fused(fused):
        raise ValueError(f"{type(fused).__name__} does not hold fused gate_up_proj and down_proj")
    gate_up = cast(Tensor, fused.gate_up_proj)
    down = cast(Tensor, fused.down_proj)
    _, D, F = down.shape
    experts = []
    for number in range(len(down)):
        with torch.device("meta"):
            expert = Expert(D, F, cast(Callable[[Tensor], Tensor], fused.act_fn))
        gate, up = gate_up[number].chunk(2)
        for linear, weight in (
            (expert.gate_proj, gate),
            (expert.up_proj, up),
            (expert.down_proj, down[number]),
        ):
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        experts.append(expert)
    return UnfusedExperts(experts)


def unfuse_experts(model: nn.Module) -> int:
    """Replace every fused experts module inside ``model``; returns how many there were."""
    names = [name for name, module in model.named_modules() if is_fused(module)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, unfuse(model.get_submodule(name)))
    return len(names)
