"""Run a block and see what its linear layers read.

Shape suffixes: B windows of a batch, T positions, D hidden size, M tokens, K features.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A module of a block that ends with a linear layer."""

    path: str
    """Of the module in the block."""
    projection: str
    """Path in the block of the layer that the module ends with, or that reads what it returns."""
    in_tuple: bool
    """It returns (output, attention weights), as transformers' attention does."""

    def features(self, block: nn.Module) -> int:
        """What the module's last layer reads, a token."""
        linear = block.get_submodule(self.projection)
        assert isinstance(linear, nn.Linear), f"{self.projection} is a linear layer"
        return linear.in_features


class _Seen(Exception):  # noqa: N818 - not an error
    """All wanted inputs were seen: the rest of the block need not run."""


def run_block(block: nn.Module, hidden_BTD: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The block's output hidden states, (B, T, D)."""
    output = block(hidden_BTD, **kwargs)
    return output[0] if isinstance(output, tuple | list) else output


def capture_inputs(
    block: nn.Module,
    names: Iterable[str],
    hidden_BTD: Tensor,
    kwargs: dict[str, Any],
    *,
    to_the_end: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs of the named linear layers for one batch; then the rest of the block is not run.

    They are what the layers are given: an ``OnlineLinear`` has yet to rotate and round them.

    Args:
        block: Not modified.
        names: Module paths inside the block.
        hidden_BTD: Input of the block.
        kwargs: The other arguments of its forward.
        to_the_end: Run the rest of the block after all.

    Returns:
        (M, K) inputs by name, M = all tokens the layer saw; and the block's output if it ran to
        its end.
    """
    seen: dict[str, Tensor] = {}
    wanted = set(names)

    def see_input(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0].flatten(0, -2)
        if len(seen) == len(wanted) and not to_the_end:
            raise _Seen

    handles = [
        block.get_submodule(name).register_forward_pre_hook(functools.partial(see_input, name))
        for name in wanted
    ]
    output_BTD = None
    try:
        with suppress(_Seen):
            output_BTD = run_block(block, hidden_BTD, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == len(wanted), f"the block did not call {sorted(wanted - seen.keys())}"
    return seen, output_BTD


@contextmanager
def replayed(block: nn.Module, ending: Ending, given_BTK: Tensor) -> Iterator[None]:
    """Let a module of the block end with remembered values instead of computing them.

    Args:
        ending: Which module.
        given_BTK: What its last layer reads.
    """
    module, last = block.get_submodule(ending.path), block.get_submodule(ending.projection)
    inside = ending.projection.startswith(f"{ending.path}.")

    def forward(*_: Any, **__: Any) -> Any:
        output_BTD = last(given_BTK) if inside else given_BTK
        return (output_BTD, None) if ending.in_tuple else output_BTD

    module.forward = forward
    try:
        yield
    finally:
        del module.forward
