"""The parts of a finished job as functions of what is trained: scales, and vectors that stay dense.

    W^ = (q - z) s e^u,     v^ = v + rms(v) u,      u = 0 before training

and the level of a path in place of q - z where weights are on a trellis. Scales of floats are kept:
with 8 bits their steps are larger than what is trained.

Parts are read from the disk at each use, so that one block's weights are in memory at a time.
Shape suffixes: B windows, T positions, C positions of a chunk, D hidden size, N out features,
G groups, g columns of a group, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rotq.checkpoint.source import read_tensors
from rotq.formats.floats import FloatGrid
from rotq.job.context import Job
from rotq.job.part_names import OUTER, block_part
from rotq.job.parts import dense_tensors, packed_layers
from rotq.job.rest import is_global, rest_in
from rotq.layers.quant_linear import QuantLinear
from rotq.models.streaming import through_head

TUNED_POSITIONS = 32
"""Positions whose logits tuning holds at a time."""


class Vectors:
    """Dense vectors of one part by full name, and the trained change of each."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.stored = {
            name: tensor
            for name, tensor in tensors.items()
            if tensor.ndim == 1 and tensor.is_floating_point() and not is_global(name)
        }
        self.changes = {name: _change(tensor) for name, tensor in self.stored.items()}

    def current(self) -> dict[str, Tensor]:
        """The vectors with their changes, in their own dtype."""
        return {
            name: (tensor.float() + _rms(tensor) * self.changes[name]).to(tensor.dtype)
            for name, tensor in self.stored.items()
        }


class TunableBlock:
    """A finished block whose weights are functions of the trained changes."""

    def __init__(self, job: Job, index: int, block: nn.Module) -> None:
        """
        Args:
            job: Its part for the block is finished.
            index: Of the block in the model.
            block: Its structure; its parameters may be on meta.
        """
        self.job, self.index, self.block = job, index, block
        stored = self._stored()
        self.vectors = Vectors(stored)
        self.scale_changes = {
            name: _change(layer.weight_scale)
            for name, layer in packed_layers(job.plan, stored).items()
            if not isinstance(layer.grid, FloatGrid)
        }

    def changes(self) -> Iterator[Tensor]:
        """All that is trained."""
        yield from self.vectors.changes.values()
        yield from self.scale_changes.values()

    def run(self, hidden_BTD: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The block's output with the changes as they are now."""
        prefix = f"{self.job.skeleton.block_name(self.index)}."
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in self._weights(hidden_BTD.dtype).items()
        }
        output = functional_call(self.block, tensors, (hidden_BTD,), kwargs)
        return output[0] if isinstance(output, tuple | list) else output

    @torch.no_grad()
    def tuned(self) -> dict[str, Tensor]:
        """The part's tensors with the changes applied, as stored."""
        stored = self._stored()
        for name, change_NG in self.scale_changes.items():
            scale_NG = stored[f"{name}.weight_scale"]
            changed_NG = (scale_NG.float() * change_NG.exp()).to(scale_NG.dtype)
            stored[f"{name}.weight_scale"] = changed_NG
        return stored | self.vectors.current()

    def _weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        stored = self._stored()
        weights: dict[str, Tensor] = {}
        for name, layer in packed_layers(self.job.plan, stored).items():
            for key in layer.state_dict():
                del stored[f"{name}.{key}"]
            if name in self.scale_changes:
                scale_NG = layer.steps() * self.scale_changes[name].exp()
                weights[f"{name}.weight"] = _Weight.apply(scale_NG, layer, dtype)
            else:
                weights[f"{name}.weight"] = layer.dequantize(dtype)
        others = {self.job.plan.dtype: dtype}
        return rest_in(stored | self.vectors.current(), dtype, others) | weights

    def _stored(self) -> dict[str, Tensor]:
        return _read(self.job, block_part(self.index))


class _Weight(torch.autograd.Function):
    """(q - z) s as a function of s alone; only the packed layer is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, scale_NG: Tensor, layer: QuantLinear, dtype: torch.dtype) -> Tensor:
        ctx.layer = layer
        return (layer.levels().mul_(scale_NG[..., None])).flatten(1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        levels_NGg = ctx.layer.levels()
        return levels_NGg.mul_(slopes[0].view_as(levels_NGg)).sum(-1), None, None


class TunableOuter:
    """What lies outside the blocks: the final norm is trained, embedding and head are not."""

    def __init__(self, job: Job, original: Mapping[str, Tensor] | None = None) -> None:
        """
        Args:
            job: Its part for this is finished.
            original: The same of the original model; None: as it is stored.
        """
        self.skeleton = job.skeleton
        self._part = _read(job, OUTER)
        self._dtype, self._others = job.dtype, {job.plan.dtype: job.dtype}
        self.stored = dense_tensors(job.plan, self._part, job.dtype)
        self.original = self.stored if original is None else dict(original)
        self.vectors = Vectors(
            {name: self._part[name] for name in self.stored if name in self._part}
        )

    def divergence(self, hidden_BTD: Tensor, original_BTD: Tensor) -> tuple[float, Tensor]:
        """KL(original || quantized) in nats per token, and its slope at ``hidden_BTD``."""
        positions = hidden_BTD.shape[:2].numel()
        divergences: list[float] = []

        def logits(hidden_BCD: Tensor) -> Tensor:
            return self.skeleton.logits(self.tensors(), hidden_BCD)

        @torch.no_grad()
        def slope(logits_BCV: Tensor, part: slice) -> Tensor:
            original_BCV = self.skeleton.logits(self.original, original_BTD[:, part])
            divergence, slope_BCV = _divergence(original_BCV, logits_BCV)
            divergences.append(divergence / positions)
            return slope_BCV / positions

        slope_BTD = through_head(logits, hidden_BTD, TUNED_POSITIONS, slope)
        return sum(divergences), slope_BTD

    def tensors(self) -> dict[str, Tensor]:
        """Dense, by full name, with the changes as they are now."""
        return self.stored | rest_in(self.vectors.current(), self._dtype, self._others)

    def tuned(self) -> dict[str, Tensor]:
        """The part's tensors with the changes applied, as stored."""
        return self._part | self.vectors.current()


def _divergence(original_BCV: Tensor, logits_BCV: Tensor) -> tuple[float, Tensor]:
    """KL(p || q) summed over positions, and its slope q - p at the logits; fp32."""
    log_p_BCV = original_BCV.float().log_softmax(-1)
    log_q_BCV = logits_BCV.float().log_softmax(-1)
    p_BCV = log_p_BCV.exp()
    total = p_BCV.mul(log_p_BCV.sub_(log_q_BCV)).sum().item()
    return total, log_q_BCV.exp_().sub_(p_BCV)


def _read(job: Job, part: str) -> dict[str, Tensor]:
    """A part's tensors before tuning, on the job's device."""
    stored = read_tensors(job.folder.part(part))
    return {name: tensor.to(job.device) for name, tensor in stored.items()}


def _change(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.float32, requires_grad=True)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.float().square().mean().sqrt()
