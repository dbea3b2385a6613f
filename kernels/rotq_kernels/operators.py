"""Registers operators with torch's dispatcher, which chooses by device and lets compilers in.

``torch.library.custom_op`` does the same, and spends up to 0.2 ms a call on the host: it goes
through its arguments in Python, mutated ones in time quadratic in their number. What is registered
here costs little more than the function itself.
"""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("rotq", "FRAGMENT")


def register(
    name: str,
    schema: str,
    *,
    cuda: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Define ``rotq::name``; returns what to call.

    Args:
        name: Of the operator.
        schema: Its arguments and results, as torch writes them; ``Tensor(a!)`` is modified.
        cuda: Runs on tensors of NVIDIA's and AMD's GPUs.
        cpu: Runs on those of a CPU.
        fake: Gives results without content, for compilers.
        backward: Gradients, as ``torch.library.register_autograd`` takes it; None where there are
            none.
        setup_context: As there.
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, cuda, "CUDA")
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"rotq::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"rotq::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    return getattr(torch.ops.rotq, name).default
