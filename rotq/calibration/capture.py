"""Run a block and see what its linear layers read.

Shape suffixes: B windows of a batch, T positions, D hidden size, M tokens, K features.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
    to_the_end: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs of the named linear layers for one batch.

    A ``RotatedLinear`` is seen behind its online rotation: what its weight multiplies.

    Args:
        block: Not modified.
        names: Module paths inside the block.
        hidden_BTD: Input of the block.
        kwargs: The other arguments of its forward.
        to_the_end: Run the whole block even when everything was seen.

    Returns:
        (M, K) inputs by name, M = all tokens the layer saw; and the block's output if it ran
        to its end.
    """
    seen: dict[str, Tensor] = {}
    wanted = set(names)

    def see(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = module.rotate_input(args[0]) if isinstance(module, RotatedLinear) else args[0]
        seen[name] = inputs.flatten(0, -2)
        if not to_the_end and len(seen) == len(wanted):
            raise _Seen

    handles = [_hook(block.get_submodule(name), name, see) for name in wanted]
    try:
        return seen, run_block(block, hidden_BTD, kwargs)
    except _Seen:
        return seen, None
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, name: str, see: Any) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda seen, args: see(name, seen, args))
