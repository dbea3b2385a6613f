"""What is trained of a basis: free parameters of matrices, and logarithms of scales.

Shape suffixes: D hidden size, L layers, H KV heads, K head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rotq.models.scalings import scalings
from rotq.models.skeleton import Skeleton
from rotq.rotations.basis import Basis
from rotq.rotations.orthogonal import Cayley, polish, turned, with_ones_kept


class Parameters:
    """Free parameters that start at a given basis, with scales of one where it has none."""

    def __init__(
        self,
        start: Basis,
        skeleton: Skeleton,
        *,
        scaled: Sequence[str],
        factors: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        """
        Args:
            start: Its matrices are trained.
            scaled: Names of scalings that are trained.
            factors: Free factors that do not start at one, by name (``LAYER.scales.NAME``).

        Raises:
            RotqError: the model does not allow a scaling.
        """
        self.start = start
        self.scalings = scalings(skeleton, scaled)
        self.residual: Cayley | None = None
        self.value: Cayley | None = None
        if start.residual_DD is not None:
            keeps_ones = skeleton.adapter.layer_norm
            self.residual = Cayley(start.residual_DD.to(device), keeps_ones=keeps_ones)
        if start.value is not None:
            self.value = Cayley(torch.stack(start.value).to(device))
        self.logs = {
            f"{layer}.scales.{name}": torch.zeros(scaling.shape, device=device)
            for layer, named in enumerate(self.scalings)
            for name, scaling in named.items()
        }
        for name, log in self.logs.items():
            if name in factors:
                log.copy_(factors[name].log())
            log.requires_grad_()

    def rotations(self) -> dict[str, Tensor]:
        """Free parameters of the matrices by name."""
        named = {"residual": self.residual, "value": self.value}
        return {name: one.free for name, one in named.items() if one is not None}

    def free(self) -> dict[str, Tensor]:
        """Everything that is trained, by name; leaves."""
        return self.rotations() | self.logs

    def basis(self) -> Basis:
        """The basis they stand for, fp32, differentiable."""
        named = {}
        if self.residual is not None:
            named["residual"] = self.residual.matrix()
        if self.value is not None:
            matrices = enumerate(self.value.matrix().unbind())
            named |= {f"value.{layer}": matrix_HKK for layer, matrix_HKK in matrices}
        for layer, scalings_ in enumerate(self.scalings):
            for name, scaling in scalings_.items():
                key = f"{layer}.scales.{name}"
                named[key] = scaling.expand(self.logs[key].exp())
        return self.start.with_tensors(named)

    @torch.no_grad()
    def restart(self) -> tuple[Basis, dict[str, Tensor]]:
        """Where they are now, as other parameters can start there: matrices, and free factors."""
        named = self.finished().tensors()
        matrices = {name: tensor for name, tensor in named.items() if ".scales." not in name}
        return self.start.with_tensors(matrices), {n: log.exp() for n, log in self.logs.items()}

    @torch.no_grad()
    def finished(self) -> Basis:
        """The basis in fp64 on the CPU: matrices orthogonal to 1e-12, ones kept to 1e-12."""
        named = {}
        for name, tensor in self.basis().tensors().items():
            exact = tensor.double().cpu()
            if name == "residual" and self.residual is not None and self.residual.keeps_ones:
                exact = with_ones_kept(exact)
            named[name] = exact if ".scales." in name else polish(exact)
        return self.start.with_tensors(named)


def movement(start: Basis, end: Basis) -> dict[str, float]:
    """For the report: rms angles between the bases in radians, and the range of each scaling."""
    figures = {}
    before, after = start.tensors(), end.tensors()
    if end.residual_DD is not None:
        figures["residual_angle"] = turned(before["residual"], after["residual"])
    if end.value is not None and start.value is not None:
        figures["value_angle"] = turned(torch.stack(start.value), torch.stack(end.value))
    for name in dict.fromkeys(key.rpartition(".")[2] for key in after if ".scales." in key):
        factors = [t for key, t in after.items() if key.endswith(f".scales.{name}")]
        figures[f"{name}_smallest"] = min(t.min().item() for t in factors)
        figures[f"{name}_largest"] = max(t.max().item() for t in factors)
    return figures
