"""Mixtures of experts with one Linear per weight, instead of transformers' 3-D parameters.

Solvers, hooks and quantized layers work on nn.Linear, and most checkpoints store experts one by
one, so the fused module is replaced by a list of experts with the same call and the same result:

    y_m = sum over slots s of  w_ms * expert_{i_ms}(x_m)

with indices i and weights w as the model's own router gives them.

Shape suffixes: M tokens, S slots (experts per token), D hidden size, F width of an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from rotq.models.fused import FusedForm, fused_form, takes_stacked


class Between(Protocol):
    """What an expert does between its products; (M, F) each."""

    def __call__(self, up_MF: Tensor, gate_MF: Tensor | None = None) -> Tensor:
        """What the last product reads."""


class Expert(nn.Module):
    """An MLP, with a gate or without: down(between(up(x), gate(x))) or down(between(up(x)))."""

    def __init__(self, form: FusedForm, between: Between) -> None:
        super().__init__()
        D, F = form.hidden_dim, form.intermediate_dim
        if form.gate:
            self.gate_proj = nn.Linear(D, F, bias=form.bias)
        self.up_proj = nn.Linear(D, F, bias=form.bias)
        self.down_proj = nn.Linear(F, D, bias=form.bias)
        self.gated, self.between = form.gate, between

    def forward(self, x_MD: Tensor) -> Tensor:
        """(M, D) to (M, D)."""
        gate_MF = self.gate_proj(x_MD) if self.gated else None
        return cast(Tensor, self.down_proj(self.between(self.up_proj(x_MD), gate_MF)))


class UnfusedExperts(nn.ModuleList):
    """A list of experts that is called as the fused module is."""

    own_rows = False
    """Each expert is given other rows than the next, so that no Hessian serves them all."""

    def __init__(self, experts: list[Expert]) -> None:
        super().__init__(experts)
        self.see_all_tokens = False
        self.routed_E = torch.zeros(len(experts), dtype=torch.int64)
        """Tokens that the router has sent to each expert while all saw all."""

    def forward(self, x_MD: Tensor, index_MS: Tensor, weight_MS: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, each times its routing weight.

        Args:
            x_MD: Tokens; any float dtype.
            index_MS: Chosen experts, int64.
            weight_MS: Routing weights, already normalised where the family does that.

        Returns:
            (M, D) in the dtype of ``x_MD``.
        """
        if self.see_all_tokens:
            counted_E = torch.bincount(index_MS.flatten().cpu(), minlength=len(self))
            self.routed_E += counted_E[: len(self)]
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


class StackedExperts(UnfusedExperts):
    """The same where every expert is given its own rows, see ``takes_stacked``."""

    own_rows = True

    def forward(self, x_LD: Tensor, *_: Tensor) -> Tensor:
        """(E M, D), the first M rows for the first expert, to what each makes of its rows.

        Tokens that are not routed to an expert are zeros there, and stay zeros. Where all are to be
        seen, an expert is given them as those had them that they are routed to.
        """
        x_EMD = x_LD.view(len(self), -1, x_LD.shape[-1])
        if not self.see_all_tokens:
            return torch.cat([expert(x_MD) for expert, x_MD in zip(self, x_EMD, strict=True)])
        is_routed_EM1 = x_EMD.any(-1, keepdim=True)
        self.routed_E += is_routed_EM1.sum((1, 2)).cpu()
        seen_EMD = torch.where(is_routed_EM1, x_EMD, x_EMD.sum(0))
        y_EMD = torch.stack([expert(x_MD) for expert, x_MD in zip(self, seen_EMD, strict=True)])
        return torch.where(is_routed_EM1, y_EMD, 0.0).flatten(0, 1)


@contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Run every expert on all tokens, so that hooks inside experts see them; same output.

    How many the router sends to each is counted anew, see ``routed_tokens``.
    """
    mixtures = [m for m in module.modules() if isinstance(m, UnfusedExperts)]
    for mixture in mixtures:
        mixture.see_all_tokens = True
        mixture.routed_E.zero_()
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.see_all_tokens = False


def routed_tokens(module: nn.Module) -> dict[str, list[int]]:
    """Tokens that routers sent to each expert in the last ``calibrating`` context, by name.

    Mixtures that were not reached are left out.
    """
    return {
        name: mixture.routed_E.tolist()
        for name, mixture in module.named_modules()
        if isinstance(mixture, UnfusedExperts) and mixture.routed_E.any()
    }


def unfuse(fused: nn.Module) -> UnfusedExperts:
    """The same experts as a list; weights are copied, on meta they stay there.

    Raises:
        ValueError: the module is none that ``fused_form`` knows.
    """
    form = fused_form(fused)
    if form is None:
        raise ValueError(f"{type(fused).__name__} does not hold fused experts of a known form")
    with torch.device("meta"):
        experts = [Expert(form, _between(fused, form)) for _ in range(form.num_experts)]
    for number, name, whole, cut in form.parts():
        linear, _, leaf = name.partition(".")
        tensor = cut(cast(Tensor, getattr(fused, whole))).detach().clone()
        parameter = nn.Parameter(tensor.contiguous(), requires_grad=False)
        setattr(experts[number].get_submodule(linear), leaf, parameter)
    return StackedExperts(experts) if takes_stacked(fused) else UnfusedExperts(experts)


def unfuse_experts(model: nn.Module) -> dict[str, FusedForm]:
    """Replace every fused experts module inside ``model``; returns what they were, by name."""
    forms = {name: fused_form(module) for name, module in model.named_modules()}
    found = {name: form for name, form in forms.items() if form is not None}
    for name in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, unfuse(model.get_submodule(name)))
    return found


def _between(fused: nn.Module, form: FusedForm) -> Between:
    own = getattr(type(fused), "_apply_gate", None)
    if form.gate and own not in (None, moe._default_apply_gate):
        return _OwnGate(fused, form)
    return _Activation(cast(Callable[[Tensor], Tensor], fused.act_fn))


class _Activation:
    """act(gate) * up, or act(up) without a gate."""

    def __init__(self, act_fn: Callable[[Tensor], Tensor]) -> None:
        self.act_fn = act_fn

    def __call__(self, up_MF: Tensor, gate_MF: Tensor | None = None) -> Tensor:
        return self.act_fn(up_MF) if gate_MF is None else self.act_fn(gate_MF) * up_MF


class _OwnGate:
    """The fused module's own gate, given gate and up side by side or in turn, as it had them."""

    def __init__(self, fused: nn.Module, form: FusedForm) -> None:
        # its settings and functions are wanted, its parameters are not
        self.fused, self.form = copy.copy(fused), form
        self.fused._parameters = {}

    def __call__(self, up_MF: Tensor, gate_MF: Tensor | None = None) -> Tensor:
        assert gate_MF is not None, "a gate of its own is a gate"
        if self.form.concatenated:
            both = torch.cat((gate_MF, up_MF), dim=-1)
        else:
            both = torch.stack((gate_MF, up_MF), dim=-1).flatten(-2)
        return cast(Tensor, self.fused._apply_gate(both))  # type: ignore[operator]
