"""After a block is solved: codes and scales of all its layers trained together on what it puts out.

    minimize over v, u  mean_t |B(x~_t; W^) - y_t|^2 / |y_t|^2,   W^ = (clamp(round(v)) - z) s e^u

x~: what the block is given in the partly quantized model, y: what the original block puts out in
the original model. Rounding lets slopes pass (straight-through), as in Block-AP of EfficientQAT
(arXiv 2407.11062), which starts from plain rounding and trains towards the block's own output; this
starts at GPTQ's codes, each v inside its code's interval where the original weight lies. The error
of a token is taken against the size of its hidden state, which the next norm divides by: a few
tokens of the sequence have states a thousand times larger than the others.

Shape suffixes: B windows, T positions, D hidden size, N out features, K in features, G groups, g
columns of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rotq.calibration.streams import Streams
from rotq.errors import RotqError
from rotq.formats.integer import Grid, Quantized
from rotq.job.context import Job
from rotq.numerics import matmul_precision
from rotq.phases import phase
from rotq.report import quarters
from rotq.solvers.scales import storable

INSIDE = 0.45
"""How far from its code a trained code may start, in steps; half a step would round to another."""


class TrainedLayer:
    """Codes of one layer as real numbers, and a change of its scales."""

    def __init__(self, weight_NK: Tensor, solved: Quantized) -> None:
        """
        Args:
            weight_NK: The original weight.
            solved: Where training starts.
        """
        self.solved = solved
        self.scale_NG = solved.scale_NG.float()
        self.zero_NG = torch.zeros_like(self.scale_NG)
        if solved.zero_NG is not None:
            self.zero_NG = solved.zero_NG.float()
        q_NK = solved.q_NK.float()
        G = self.scale_NG.shape[1]
        wanted_NGg = weight_NK.float().unflatten(1, (G, -1)) / self.scale_NG[..., None]
        wanted_NK = (wanted_NGg + self.zero_NG[..., None]).flatten(1)
        start_NK = torch.clamp(wanted_NK, q_NK - INSIDE, q_NK + INSIDE)
        self.code_NK = start_NK.requires_grad_()
        self.change_NG = torch.zeros_like(self.scale_NG).requires_grad_()

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(N, K); slopes reach codes and scales."""
        weight_NK: Tensor = _Rounded.apply(
            self.code_NK, self.change_NG, self.scale_NG, self.zero_NG, self.solved.grid, dtype
        )
        return weight_NK

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """As it is stored."""
        dtype = self.solved.scale_NG.dtype
        return Quantized(
            q_NK=_rounded(self.code_NK, self.solved.grid).to(torch.int8),
            scale_NG=storable(self.scale_NG * self.change_NG.exp(), dtype).to(dtype),
            zero_NG=self.solved.zero_NG,
            grid=self.solved.grid,
        )


class _Rounded(torch.autograd.Function):
    """(clamp(round(v)) - z) s e^u; nothing but its arguments is kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        code_NK: Tensor,
        change_NG: Tensor,
        scale_NG: Tensor,
        zero_NG: Tensor,
        grid: Grid,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(code_NK, change_NG, scale_NG, zero_NG)
        ctx.grid = grid
        levels_NGg = _levels(code_NK, zero_NG, grid)
        return levels_NGg.mul_((scale_NG * change_NG.exp())[..., None]).flatten(1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        code_NK, change_NG, scale_NG, zero_NG = ctx.saved_tensors
        slope_NGg = slopes[0].float().unflatten(1, (scale_NG.shape[1], -1))
        step_NG = scale_NG * change_NG.exp()
        levels_NGg = _levels(code_NK, zero_NG, ctx.grid)
        change_slope_NG = levels_NGg.mul_(slope_NGg).sum(-1).mul_(step_NG)
        inside_NK = (code_NK >= ctx.grid.q_min - 0.5) & (code_NK <= ctx.grid.q_max + 0.5)
        code_slope_NK = (slope_NGg * step_NG[..., None]).flatten(1).mul_(inside_NK)
        return code_slope_NK, change_slope_NG, None, None, None, None


@phase("tuning")
def train_codes(
    job: Job,
    index: int,
    blocks: tuple[nn.Module, nn.Module],
    solved: Mapping[str, Quantized],
    streams: Streams,
) -> tuple[dict[str, Quantized], dict[str, float]]:
    """Train, and put the result into the working block.

    Args:
        job: Of its recipe, ``tuning``.
        index: Of the block in the model.
        blocks: The original one, and the working one with the solved weights in place.
        solved: By path inside the block.
        streams: The quantized one before the block, the original one past it.

    Returns:
        What is stored, by path; and the mean loss over the first and the last quarter of the steps.

    Raises:
        RotqError: the loss is not finite; names the block.
    """
    original, working = blocks
    layers = {
        path: TrainedLayer(original.get_submodule(path).weight, quantized)  # type: ignore[arg-type]
        for path, quantized in solved.items()
    }
    losses = _train(job, index, working, layers, streams)
    trained = {path: layer.quantized() for path, layer in layers.items()}
    for path, quantized in trained.items():
        weight_NK = working.get_parameter(f"{path}.weight")
        with torch.no_grad():
            weight_NK.copy_(quantized.dequantize(weight_NK.dtype))
    streams.quantized.forget()  # what attention came to with the codes as solved
    first, last = quarters(losses)
    return trained, {"loss_first": first, "loss_last": last}


def _train(
    job: Job,
    index: int,
    block: nn.Module,
    layers: Mapping[str, TrainedLayer],
    streams: Streams,
) -> list[float]:
    """All steps, each on one window; the loss before each."""
    tuning = job.recipe.tuning
    codes = [layer.code_NK for layer in layers.values()]
    changes = [layer.change_NG for layer in layers.values()]
    optimizer = torch.optim.Adam(
        [
            {"params": codes, "lr": tuning.code_rate, "peak": tuning.code_rate},
            {"params": changes, "lr": tuning.scale_rate, "peak": tuning.scale_rate},
        ],
        betas=(0.9, 0.95),
    )
    windows, first = _windows(job), job.ranks.first_of_own(len(job.windows.batches))
    order = torch.randperm(
        len(windows), generator=torch.Generator().manual_seed(job.recipe.calibration.seed)
    ).tolist()
    losses: list[float] = []
    with matmul_precision(job.recipe.calibration.precision), torch.enable_grad():
        for step in range(tuning.code_steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (1 - step / tuning.code_steps)
            optimizer.zero_grad()
            number, part = windows[order[step % len(order)]]
            loss = torch.zeros(())
            if 0 <= number - first < len(streams.batches):
                loss = _loss(job, index, block, layers, streams, (number - first, part))
            losses += job.ranks.total(loss.item())
            if not losses[-1] < float("inf"):
                name = job.skeleton.block_name(index)
                raise RotqError(
                    f"{name}: training codes, the loss is {losses[-1]} at step {step + 1}"
                )
            if loss.requires_grad:
                loss.backward()
            job.ranks.sum_gradients([*codes, *changes])
            optimizer.step()
    return losses


def _loss(
    job: Job,
    index: int,
    block: nn.Module,
    layers: Mapping[str, TrainedLayer],
    streams: Streams,
    window: tuple[int, tuple[slice, slice]],
) -> Tensor:
    number, part = window
    given_BTD = streams.quantized.hidden[number][part].to(job.device)
    assert streams.original is not None, "a job that trains codes keeps the original stream"
    wanted_BTD = streams.original.hidden[number][part].to(job.device).float()
    kwargs = job.skeleton.block_kwargs(index, given_BTD)
    weights = {f"{path}.weight": layer.weight(given_BTD.dtype) for path, layer in layers.items()}
    output = functional_call(block, weights, (given_BTD,), kwargs)
    found_BTD = output[0] if isinstance(output, tuple | list) else output
    error_BT = (found_BTD.float() - wanted_BTD).square().sum(-1)
    return (error_BT / wanted_BTD.square().sum(-1).clamp(min=1e-20)).mean()


def _windows(job: Job) -> list[tuple[int, tuple[slice, slice]]]:
    """Number of the batch, and the part of it, for every window; padding is cut off."""
    batches = enumerate(job.windows.batches)
    return [(number, part) for number, batch in batches for part in batch.windows()]


def _rounded(code_NK: Tensor, grid: Grid) -> Tensor:
    return code_NK.round().clamp_(grid.q_min, grid.q_max)


def _levels(code_NK: Tensor, zero_NG: Tensor, grid: Grid) -> Tensor:
    """q - z, fp32 (N, G, g)."""
    levels_NGg = _rounded(code_NK, grid).unflatten(1, (zero_NG.shape[1], -1))
    return levels_NGg.sub_(zero_NG[..., None])
