"""What is trained of a basis: free parameters of matrices and angles, and logarithms of scales.

Shape suffixes: D hidden size, L layers, H KV heads, K head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from rotq.errors import RotqError
from rotq.models.scalings import scalings
from rotq.models.skeleton import Skeleton
from rotq.rotations.basis import Basis
from rotq.rotations.butterfly import (
    HADAMARD_ANGLE,
    Butterfly,
    angle_shape,
    from_codes,
    to_codes,
)
from rotq.rotations.orthogonal import Cayley, polish, turned


class Parameters:
    """Free parameters that start at a given basis, with scales of one where it has none."""

    def __init__(
        self,
        start: Basis,
        skeleton: Skeleton,
        *,
        scaled: Sequence[str],
        factors: Mapping[str, Tensor],
        butterfly: bool = False,
        device: torch.device,
    ) -> None:
        """
        Args:
            start: Its matrices are trained.
            scaled: Names of scalings that are trained.
            factors: Free factors that do not start at one, by name (``LAYER.scales.NAME``).
            butterfly: R4's angles are trained; else R4 stays.

        Raises:
            RotqError: the model does not allow a scaling, or has no pairs for a butterfly.
        """
        self.start = start
        self.scalings = scalings(skeleton, scaled)
        self.residual: Cayley | None = None
        self.value: Cayley | None = None
        if start.residual_DD is not None:
            self.residual = Cayley(start.residual_DD.to(device))
        if start.value is not None:
            self.value = Cayley(torch.stack(start.value).to(device))
        self.down: list[Butterfly] = []
        if butterfly:
            self.down = _butterflies(start, skeleton, device)
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
        """Free parameters of the matrices and angles by name."""
        named = {"residual": self.residual, "value": self.value}
        free = {name: one.free for name, one in named.items() if one is not None}
        return free | {f"down.{layer}": one.free for layer, one in enumerate(self.down)}

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
        named |= {f"down.{layer}": one.angles() for layer, one in enumerate(self.down)}
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
        """The basis in fp64 on the CPU: matrices orthogonal to 1e-12, angles in whole steps."""
        named = {}
        for name, tensor in self.basis().tensors().items():
            exact = tensor.double().cpu()
            if name.startswith("down."):
                exact = from_codes(to_codes(exact), torch.float64)
            elif ".scales." not in name:
                exact = polish(exact)
            named[name] = exact
        return self.start.with_tensors(named)


def _butterflies(start: Basis, skeleton: Skeleton, device: torch.device) -> list[Butterfly]:
    """One per layer, at the start's angles where it has some."""
    if start.down_angles is not None:
        return [Butterfly(angles.to(device)) for angles in start.down_angles]
    made = []
    for block in skeleton.blocks:
        paths = skeleton.adapter.mlp_writers(block)
        width = cast(nn.Linear, block.get_submodule(paths[0])).in_features
        try:
            shape = (len(paths), *angle_shape(width))
        except ValueError as error:
            raise RotqError(f"transform.down=butterfly: {error}; use fixed") from None
        made.append(Butterfly(torch.full(shape, HADAMARD_ANGLE, device=device)))
    return made


def movement(start: Basis, end: Basis) -> dict[str, float]:
    """For the report: rms angles between the bases in radians, and the range of each scaling."""
    figures = {}
    before, after = start.tensors(), end.tensors()
    if end.residual_DD is not None:
        figures["residual_angle"] = turned(before["residual"], after["residual"])
    if end.value is not None and start.value is not None:
        figures["value_angle"] = turned(torch.stack(start.value), torch.stack(end.value))
    if end.down_angles is not None:
        moved = torch.cat([(t - HADAMARD_ANGLE).flatten() for t in end.down_angles])
        figures["down_pair_angle"] = moved.square().mean().sqrt().item()
    for name in dict.fromkeys(key.rpartition(".")[2] for key in after if ".scales." in key):
        factors = [t for key, t in after.items() if key.endswith(f".scales.{name}")]
        figures[f"{name}_smallest"] = min(t.min().item() for t in factors)
        figures[f"{name}_largest"] = max(t.max().item() for t in factors)
    return figures
