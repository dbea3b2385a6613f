"""The residual stream turned in front of the first block, and back behind the last, at run time.

    x <- (x * signs) H       what the first block is given
    x <- (x H^T) * signs     what the last block gives

H is an orthonormal Hadamard matrix of the stream's width. The blocks in between have R1 = D H fused
into them; embedding, final norm and head are the original's, so that a head which shares the
embedding's tensor still does.

Shape suffixes: D hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rotq.layers.online_linear import rotate_input
from rotq.rotations.hadamard import inverse_hadamard

SIGNS = "residual_signs"
"""Of the buffer in the first and in the last block, int8 (D)."""


def turn_ends(block: nn.Module, signs_D: Tensor, *, first: bool, last: bool) -> None:
    """Let a block turn what it is given, or turn back what it gives, or both, from now on.

    Args:
        block: Gets the buffer and hooks; one that is neither first nor last is left alone. Its
            first argument, and its output or the first of its outputs, are hidden states.
        signs_D: +1 and -1, any dtype; may be on meta.
    """
    if not (first or last):
        return
    block.register_buffer(SIGNS, signs_D)
    if first:
        block.register_forward_pre_hook(_turn, with_kwargs=True)
    if last:
        block.register_forward_hook(_turn_back)


def _turn(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    signs_D = block.get_buffer(SIGNS)
    if not args:
        hidden = kwargs["hidden_states"]
        return args, {**kwargs, "hidden_states": rotate_input(hidden, signs_D)}
    return (rotate_input(args[0], signs_D), *args[1:]), kwargs


def _turn_back(block: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
    signs_D = block.get_buffer(SIGNS)
    if isinstance(output, Tensor):
        return inverse_hadamard(output, signs_D)
    return type(output)((inverse_hadamard(output[0], signs_D), *output[1:]))
