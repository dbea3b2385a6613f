"""Run a block and see what its linear layers read.

Shape suffixes: B windows of a batch, T positions, D hidden size, M tokens, K features.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from rotq.layers import RotatedLinear


class _Seen(Exception):  # noqa: N818 - not an error
    """All wanted inputs were seen: the rest of the block need not run."""


def run_block(block: nn.Module, hidden_BTD: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The block's output hidden states, (B, T, D)."""
    output = block(hidden_BTD, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def capture_inputs(
    block: nn.Module,
    names: Iterable[str],
    hidden_BTD: Tensor,
    kwargs: dict[str, Any],
    *,
    output_of: str = "",
    to_the_end: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs of the named linear layers for one batch; then the rest of the block is not run.

    A ``RotatedLinear`` is seen behind its online rotation: what its weight multiplies.

    Args:
        block: Not modified.
        names: Module paths inside the block.
        hidden_BTD: Input of the block.
        kwargs: The other arguments of its forward.
        output_of: Path of a module whose output is wanted too.
        to_the_end: Run the rest of the block after all.

    Returns:
        (M, K) inputs by name, M = all tokens the layer saw, with the output (B, T, D) of the module
        ``output_of`` under its path; and the block's output if it ran to its end.
    """
    seen: dict[str, Tensor] = {}
    wanted = set(names)
    num_wanted = len(wanted) + bool(output_of)

    def see(name: str, value: Tensor) -> None:
        seen[name] = value
        if len(seen) == num_wanted and not to_the_end:
            raise _Seen

    def see_input(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = module.rotate_input(args[0]) if isinstance(module, RotatedLinear) else args[0]
        see(name, inputs.flatten(0, -2))

    handles = [
        block.get_submodule(name).register_forward_pre_hook(functools.partial(see_input, name))
        for name in wanted
    ]
    if output_of:
        watched = block.get_submodule(output_of)
        handles.append(watched.register_forward_hook(lambda *call: see(output_of, call[-1][0])))
    output_BTD = None
    try:
        with suppress(_Seen):
            output_BTD = run_block(block, hidden_BTD, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == num_wanted, f"the block did not call {sorted(wanted - seen.keys())}"
    return seen, output_BTD


@contextmanager
def replayed(block: nn.Module, path: str, output_BTD: Tensor | None) -> Iterator[None]:
    """Let the block's attention return a remembered output instead of computing it.

    Args:
        block: Its attention returns (output, attention weights), as transformers' do.
        path: Of the attention in the block.
        output_BTD: None lets it compute.
    """
    if output_BTD is None:
        yield
        return
    module = block.get_submodule(path)
    module.forward = lambda *args, **kwargs: (output_BTD, None)
    try:
        yield
    finally:
        del module.forward
