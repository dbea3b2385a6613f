"""After the last block: train scales and gains of all blocks together, codes stay as they are.

    minimize over u  mean_t KL(p_t || p^_t(u)),   W^ = (q - z) s e^u,   v^ = v + rms(v) u

p: the original model on a calibration window, p^: the quantized one; v: what stays dense and is a
vector (norm gains, biases). GPTQ minimizes the error of one layer at a time; this takes the part of
the remaining error that a rescaling can undo, with the objective of KL-Top (OSTQuant, arXiv
2501.13987, eq. 9) over the whole vocabulary. Adam, one window per step, linear warm-up and decay.

Blocks are streamed here too: the forward pass keeps hidden states only, the backward pass runs each
block again, and a block's weight exists while it is run. The original model is not run at all: its
stream of hidden states ends with what the head reads.

Shape suffixes: B windows, T positions, D hidden size, N out features, G groups, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rotq.calibration.streams import Stream
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.source import read_tensor
from rotq.errors import RotqError
from rotq.job import OUTER, TUNING, Job, block_part, tuned_part
from rotq.models.skeleton import Skeleton
from rotq.parts import packed_layers
from rotq.plan import TUNED_POSITIONS, Plan
from rotq.precision import matmul_precision
from rotq.recipe import Recipe
from rotq.report import Progress


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the training works on."""

    job: Job
    skeleton: Skeleton
    plan: Plan
    recipe: Recipe
    device: torch.device
    progress: Progress


def tune(
    setting: Setting, blocks: Sequence[nn.Module], ids: Sequence[Tensor], original: Stream
) -> None:
    """Train, and write every part of the job anew with what was found; codes are copied.

    Args:
        setting: All of its parts are finished.
        blocks: From ``hollow``, one per block of the model.
        ids: (B, T) calibration tokens of each batch.
        original: (B, T, D) outputs of the original model's last block, batch by batch.

    Raises:
        RotqError: the divergence is not finite; names the step.
    """
    job = setting.job
    trained = [_Block(setting, index, block) for index, block in enumerate(blocks)]
    outer = _Outer(setting)
    divergences = _train(setting, trained, outer, ids, original)
    for index, block in enumerate(trained):
        save_tensors(job.part(tuned_part(block_part(index))), block.tuned())
    save_tensors(job.part(tuned_part(OUTER)), outer.tensors())
    quarter = max(1, len(divergences) // 4)
    first, last = divergences[:quarter], divergences[-quarter:]
    job.record(
        TUNING,
        {
            "steps": len(divergences),
            "kl_first_quarter": sum(first) / quarter,
            "kl_last_quarter": sum(last) / quarter,
        },
    )


def hollow(block: nn.Module) -> nn.Module:
    """A copy of a block with its parameters on meta; buffers are shared."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in block.buffers()}
    for parameter in block.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    config = getattr(block, "config", None)
    return copy.deepcopy(block, memo | {id(config): config})


def _train(
    setting: Setting,
    blocks: list[_Block],
    outer: _Outer,
    ids: Sequence[Tensor],
    original: Stream,
) -> list[float]:
    tuning = setting.recipe.tuning
    changes = [*outer.vectors.changes.values(), *(c for block in blocks for c in block.changes())]
    optimizer = torch.optim.Adam(changes, lr=tuning.learning_rate, betas=(0.9, 0.95))
    windows = [(batch, row) for batch, ids_BT in enumerate(ids) for row in range(len(ids_BT))]
    divergences: list[float] = []
    with matmul_precision(setting.recipe.calibration.precision), torch.enable_grad():
        for step in range(tuning.steps):
            batch, row = windows[step % len(windows)]
            part = (slice(row, row + 1), slice(tuning.seq_len or None))
            for group in optimizer.param_groups:
                group["lr"] = tuning.learning_rate * _schedule(step, tuning.steps)
            optimizer.zero_grad()
            divergence = _backward(setting, blocks, outer, ids[batch][part], original[batch][part])
            if not divergence < float("inf"):
                raise RotqError(f"tuning: the divergence is {divergence} at step {step + 1}")
            optimizer.step()
            divergences.append(divergence)
            setting.progress.tuning_step(step, tuning.steps, divergence)
    return divergences


def _schedule(step: int, steps: int) -> float:
    """Four steps of linear warm-up, then linear decay to 2 %."""
    return min(1.0, (step + 1) / 4) * max(0.02, 1 - step / steps)


def _backward(
    setting: Setting, blocks: list[_Block], outer: _Outer, ids_BT: Tensor, original_BTD: Tensor
) -> float:
    """Gradients of one window's divergence, added to the changes; returns the divergence."""
    skeleton = setting.skeleton
    hidden_BTD = skeleton.embed(outer.stored, ids_BT.to(setting.device))
    inputs: list[Tensor] = []
    with torch.no_grad():
        for index, block in enumerate(blocks):
            inputs.append(hidden_BTD)
            hidden_BTD = block.run(hidden_BTD, skeleton.block_kwargs(index, hidden_BTD))
    divergence, slope_BTD = outer.divergence(hidden_BTD, original_BTD.to(setting.device))
    for index in reversed(range(len(blocks))):
        given_BTD = inputs.pop().requires_grad_()
        output_BTD = blocks[index].run(given_BTD, skeleton.block_kwargs(index, given_BTD))
        output_BTD.backward(slope_BTD)
        assert given_BTD.grad is not None, "the block's input reaches its output"
        slope_BTD = given_BTD.grad
    return divergence


class _Vectors:
    """Dense vectors of one part by full name, and the trained change of each."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.stored = {
            name: tensor
            for name, tensor in tensors.items()
            if tensor.ndim == 1 and tensor.is_floating_point()
        }
        self.changes = {name: _change(tensor) for name, tensor in self.stored.items()}

    def current(self) -> dict[str, Tensor]:
        """The vectors with their changes, in their own dtype."""
        return {
            name: (tensor.float() + _rms(tensor) * self.changes[name]).to(tensor.dtype)
            for name, tensor in self.stored.items()
        }


class _Block:
    """A finished block whose weights are functions of the trained changes."""

    def __init__(self, setting: Setting, index: int, block: nn.Module) -> None:
        self.file = setting.job.part(block_part(index))
        self.prefix = setting.skeleton.block_name(index)
        self.plan, self.device, self.block = setting.plan, setting.device, block
        stored = self._stored()
        self.vectors = _Vectors(stored)
        self.scale_changes = {
            name: _change(layer.weight_scale)
            for name, layer in packed_layers(self.plan, stored).items()
        }

    def changes(self) -> Iterator[Tensor]:
        """All that is trained."""
        yield from self.vectors.changes.values()
        yield from self.scale_changes.values()

    def run(self, hidden_BTD: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The block's output with the changes as they are now."""
        tensors = {
            name.removeprefix(f"{self.prefix}."): tensor
            for name, tensor in self._weights(hidden_BTD.dtype).items()
        }
        output = functional_call(self.block, tensors, (hidden_BTD,), kwargs)
        return output[0] if isinstance(output, tuple) else output

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
        for name, layer in packed_layers(self.plan, stored).items():
            for key in layer.state_dict():
                del stored[f"{name}.{key}"]
            quantized = layer.quantized()
            levels_NGg = quantized.q_NK.float().unflatten(1, (quantized.scale_NG.shape[1], -1))
            if quantized.zero_NG is not None:
                levels_NGg -= quantized.zero_NG.float()[..., None]
            scale_NG = quantized.scale_NG.float() * self.scale_changes[name].exp()
            weights[f"{name}.weight"] = (levels_NGg * scale_NG[..., None]).flatten(1).to(dtype)
        return stored | self.vectors.current() | weights

    def _stored(self) -> dict[str, Tensor]:
        entries = read_entries(self.file)
        return {entry.name: read_tensor(entry).to(self.device) for entry in entries}


class _Outer:
    """What lies outside the blocks: the final norm is trained, embedding and head are not."""

    def __init__(self, setting: Setting) -> None:
        self.skeleton, file = setting.skeleton, setting.job.part(OUTER)
        device = setting.device
        self.stored = {e.name: read_tensor(e).to(device) for e in read_entries(file)}
        self.vectors = _Vectors(self.stored)

    def divergence(self, hidden_BTD: Tensor, original_BTD: Tensor) -> tuple[float, Tensor]:
        """KL(original || quantized) in nats per token, and its slope at ``hidden_BTD``."""
        total, positions = 0.0, hidden_BTD.shape[:2].numel()
        slopes: list[Tensor] = []
        chunks = zip(
            hidden_BTD.split(TUNED_POSITIONS, dim=1),
            original_BTD.split(TUNED_POSITIONS, dim=1),
            strict=True,
        )
        for hidden_BCD, original_BCD in chunks:
            with torch.no_grad():
                log_p_BCV = self.skeleton.logits(self.stored, original_BCD).float().log_softmax(-1)
            hidden_BCD = hidden_BCD.detach().requires_grad_()
            logits_BCV = self.skeleton.logits(self.tensors(), hidden_BCD)
            log_q_BCV = logits_BCV.float().log_softmax(-1)
            divergence = (log_p_BCV.exp() * (log_p_BCV - log_q_BCV)).sum() / positions
            divergence.backward()
            total += divergence.item()
            assert hidden_BCD.grad is not None, "the logits depend on the hidden states"
            slopes.append(hidden_BCD.grad)
        return total, torch.cat(slopes, dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """By full name, with the changes as they are now."""
        return self.stored | self.vectors.current()


def _change(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.float32, requires_grad=True)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.float().square().mean().sqrt()
