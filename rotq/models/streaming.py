"""Streaming: passes forward and backward through blocks that are not in memory together.

The forward pass keeps the hidden states between blocks only; the backward pass runs each block
again, with a graph, from the last to the first.

Shape suffixes: B windows, T positions, C positions of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rotq.memory import trim_memory

_BLOCKS_PER_TRIM = 5

Run = Callable[[Tensor], Tensor]
"""A block: (B, T, D) to (B, T, D), the same for the same input."""


def run_forward(blocks: Sequence[Run], hidden_BTD: Tensor) -> list[Tensor]:
    """Without gradients: the inputs of all blocks, and the output of the last."""
    states = [hidden_BTD]
    with torch.no_grad():
        for index, block in enumerate(blocks):
            states.append(block(states[-1]))
            trim_now_and_then(index)
    return states


def run_backward(blocks: Sequence[Run], states: list[Tensor], slope_BTD: Tensor) -> Tensor:
    """Add the gradients of what the blocks were made of to it; ``states`` is used up.

    Args:
        blocks: As in ``run_forward``.
        states: Inputs of the blocks.
        slope_BTD: Of the loss, at the last block's output.

    Returns:
        The slope at the first block's input.
    """
    for index, block in reversed(list(enumerate(blocks))):
        given_BTD = states.pop().requires_grad_()
        with torch.enable_grad():
            output_BTD = block(given_BTD)
        output_BTD.backward(slope_BTD)
        assert given_BTD.grad is not None, "the block's input reaches its output"
        slope_BTD = given_BTD.grad
        del output_BTD
        trim_now_and_then(index)
    return slope_BTD


def through_head(
    logits: Run, hidden_BTD: Tensor, size: int, slope: Callable[[Tensor, slice], Tensor]
) -> Tensor:
    """A backward pass through the head, some positions at a time: all logits take too much memory.

    Gradients of what ``logits`` is made of are added to it.

    Args:
        logits: Of hidden states (B, C, D), as (B, C, V).
        hidden_BTD: The last block's output, not modified.
        size: C, positions of a chunk.
        slope: Of the loss at a chunk's logits, given them without a graph and where the chunk is.

    Returns:
        The slope at ``hidden_BTD``.
    """
    slopes = []
    for start in range(0, hidden_BTD.shape[1], size):
        part = slice(start, start + size)
        hidden_BCD = hidden_BTD[:, part].detach().requires_grad_()
        with torch.enable_grad():
            logits_BCV = logits(hidden_BCD)
        logits_BCV.backward(slope(logits_BCV.detach(), part).to(logits_BCV.dtype))
        assert hidden_BCD.grad is not None, "the logits depend on the hidden states"
        slopes.append(hidden_BCD.grad)
    return torch.cat(slopes, dim=1)


def trim_now_and_then(index: int) -> None:
    """Give freed memory back after some of the blocks."""
    # giving memory back takes as long as a block's products; blocks use what others have freed
    if index % _BLOCKS_PER_TRIM == 0:
        trim_memory()
