"""How transformers stores the experts of a mixture: all of them in one 3-D parameter per layer.

    gate_up_proj   (E, 2F, D): gates first, or gate and up in turn
    up_proj        (E, F, D), where there is no gate
    down_proj      (E, D, F)
    *_bias         (E, 2F), (E, F), (E, D)

or all matrices transposed. What a module has is said by the attributes that transformers'
``use_experts_implementation`` gives it; what it does between the products is its ``_apply_gate``.

Shape suffixes: E experts, D hidden size, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

Cut = Callable[[Tensor], Tensor]
"""From a fused parameter to one expert's, as a view."""


@dataclass(frozen=True, kw_only=True)
class FusedForm:
    """Which parameters a fused module has, and where one expert's are in them."""

    num_experts: int
    hidden_dim: int
    intermediate_dim: int
    gate: bool
    bias: bool
    transposed: bool
    """Matrices are (E, in, out)."""
    concatenated: bool
    """Gates come first, then ups; else they take turns."""

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of an expert's linear layers, in the order in which they are used."""
        return ("gate_proj", "up_proj", "down_proj") if self.gate else ("up_proj", "down_proj")

    def parts(self) -> Iterator[tuple[int, str, str, Cut]]:
        """Expert, its parameter ("up_proj.weight"), the fused parameter, and the cut."""
        for expert in range(self.num_experts):
            for linear in self.linears:
                fused, half = self._fused(linear)
                yield expert, f"{linear}.weight", fused, self._cut(expert, half, matrix=True)
                if self.bias:
                    yield (
                        expert,
                        f"{linear}.bias",
                        f"{fused}_bias",
                        self._cut(expert, half, matrix=False),
                    )

    def _fused(self, linear: str) -> tuple[str, int | None]:
        """Name of the fused parameter, and which half of it."""
        if linear == "down_proj" or not self.gate:
            return linear, None
        return "gate_up_proj", 0 if linear == "gate_proj" else 1

    def _cut(self, expert: int, half: int | None, *, matrix: bool) -> Cut:
        def cut(fused: Tensor) -> Tensor:
            rows = fused[expert].T if matrix and self.transposed else fused[expert]
            if half is None:
                return rows
            F = self.intermediate_dim
            return rows[half * F : (half + 1) * F] if self.concatenated else rows[half::2]

        return cut


def fused_form(module: nn.Module) -> FusedForm | None:
    """Of a fused experts module; None for any other.

    One that does more than these products and a gate is another: it adds a norm, or some of its
    experts have no weights.
    """
    settings = _settings(module)
    if settings is None or list(module.children()) != _plain(module):
        return None
    gate, bias, transposed, concatenated = settings
    down = getattr(module, "down_proj", None)
    if not isinstance(down, Tensor) or down.ndim != 3:
        return None
    E, D, F = (down.shape[0], down.shape[2], down.shape[1]) if transposed else down.shape
    form = FusedForm(
        num_experts=E,
        hidden_dim=D,
        intermediate_dim=F,
        gate=gate,
        bias=bias,
        transposed=transposed,
        concatenated=concatenated,
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return form if shapes == _shapes(form) else None


def takes_stacked(module: nn.Module) -> bool:
    """Whether the module is given every expert's tokens, one expert's after the other's.

    Llama 4's: (E M, D), where the tokens of an expert that they are not routed to are zeros.
    """
    return type(module).__name__ == "Llama4TextExperts"


def _settings(module: nn.Module) -> tuple[bool, bool, bool, bool] | None:
    """Whether it has a gate and biases, is transposed, and has gates first; None for no experts."""
    if takes_stacked(module):
        return True, False, True, True
    names = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    if not all(hasattr(module, name) for name in (*names, "_apply_gate")):
        return None
    if getattr(module, "has_post_expert_norm", False):
        return None
    gate, bias, transposed, concatenated = (bool(getattr(module, name)) for name in names)
    return gate, bias, transposed, concatenated


def _shapes(form: FusedForm) -> dict[str, tuple[int, ...]]:
    E, D = form.num_experts, form.hidden_dim
    F = form.intermediate_dim * (2 if form.gate else 1)
    first = "gate_up_proj" if form.gate else "up_proj"
    matrices = {first: (F, D), "down_proj": (D, form.intermediate_dim)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in matrices.items():
        shapes[name] = (E, columns, rows) if form.transposed else (E, rows, columns)
        if form.bias:
            shapes[f"{name}_bias"] = (E, rows)
    return shapes


def _plain(module: nn.Module) -> list[Any]:
    """Its activation function, the one child that an experts module may have."""
    act_fn = cast(object, getattr(module, "act_fn", None))
    return [act_fn] if isinstance(act_fn, nn.Module) else []
