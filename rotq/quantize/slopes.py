"""Slopes of the loss at the outputs of a block's layers, and the weights of tokens made of them.

Shape suffixes: B windows, T positions, C positions of a chunk, D hidden size, M tokens, N out
features, G groups of rows, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rotq.errors import RotqError
from rotq.models.experts import UnfusedExperts

Listener = Callable[[str, Tensor, Tensor], None]


def checked(slope_BTD: Tensor) -> Tensor:
    """Slopes at the last block's output, (B, T, D), as they are.

    Raises:
        RotqError: a window has none, or one that is not finite.
    """
    largest_B = slope_BTD.abs().amax((1, 2))
    if not largest_B.isfinite().all():
        raise RotqError("the gradient of the loss at the head is not finite")
    if not largest_B.all():
        raise RotqError("a calibration window has no gradient: nothing in it is asked of the model")
    return slope_BTD


def sampled_slope(logits_BCV: Tensor, generator: torch.Generator) -> Tensor:
    """Slope of - log p(z) with z drawn from p, at the logits: p - onehot(z).

    Args:
        logits_BCV: fp32, not modified.
        generator: On the CPU, where is drawn.
    """
    slope_BCV = logits_BCV.softmax(-1)
    drawn_M1 = torch.multinomial(slope_BCV.flatten(0, 1).cpu(), 1, generator=generator)
    drawn_BC1 = drawn_M1.view(*slope_BCV.shape[:2], 1).to(slope_BCV.device)
    return slope_BCV.scatter_add_(-1, drawn_BC1, -torch.ones_like(slope_BCV[..., :1]))


@contextmanager
def observed(
    block: nn.Module, paths: Sequence[str], groups: int, tell: Listener | None = None
) -> Iterator[dict[str, Tensor]]:
    """Mean squared slopes at the outputs of linear layers, (M, G) fp32 by path, once known.

    Args:
        tell: Is given each layer's path, its input and the slope at its output.
    """
    seen: dict[str, Tensor] = {}

    def see(path: str, x: Tensor, slope: Tensor) -> None:
        if tell is not None:
            tell(path, x, slope)
        slope_MN = slope.flatten(0, -2).float()
        means = [part_MN.square().mean(-1) for part_MN in slope_MN.tensor_split(groups, dim=-1)]
        square_MG = torch.stack(means, dim=-1)
        seen[path] = seen[path] + square_MG if path in seen else square_MG

    def watch(path: str, module: nn.Module, args: object, output: Tensor) -> None:
        assert isinstance(args, tuple)
        output.register_hook(functools.partial(see, path, args[0].detach()))

    handles = [
        block.get_submodule(path).register_forward_hook(functools.partial(watch, path))
        for path in paths
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def of_tokens(name: str, square_TG: Tensor | None, length: int) -> Tensor:
    """The mean squared slopes (T, G) fp32 of a window at one layer, moved to the CPU.

    Raises:
        RotqError: the layer was not called, or not for every token once.
    """
    if square_TG is None or len(square_TG) != length:
        calls = "does not reach the loss" if square_TG is None else "is not given every token"
        raise RotqError(f"{name} {calls}, so importance.strategy=gradient cannot weigh its inputs")
    return square_TG.cpu()


def with_mean_one(name: str, square_MG: Tensor, is_expert: bool) -> Tensor:
    """Squared slopes (M, G), divided by their mean over the tokens: fp32, of mean one.

    Ones for an expert that no token was sent to.

    Raises:
        RotqError: nothing reaches another layer, or what reaches it is not finite.
    """
    mean_G = square_MG.double().mean(0)
    if not mean_G.isfinite().all():
        raise RotqError(f"{name}: the gradient of the loss is not finite")
    if is_expert:
        square_MG = torch.where(mean_G == 0, 1.0, square_MG)
        mean_G = torch.where(mean_G == 0, 1.0, mean_G)
    if not (mean_G > 0).all():
        raise RotqError(f"{name}: the loss has no gradient there; importance.strategy=none works")
    return (square_MG / mean_G).float().contiguous()


def inside_experts(block: nn.Module) -> set[str]:
    """Paths of everything inside experts."""
    mixtures = [name for name, m in block.named_modules() if isinstance(m, UnfusedExperts)]
    names = [name for name, _ in block.named_modules()]
    return {name for name in names if any(name.startswith(f"{mixture}.") for mixture in mixtures)}
