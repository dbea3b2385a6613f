"""What transformers computes in fp32 whatever comes in, computed in fp64 instead.

Norms, softmax, rotary embeddings, routers and recurrent states are cast to fp32 by many families.
An exact rotation would be hidden behind errors of 1e-7.

Shape suffixes: N tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Inside the context fp64 is taken wherever fp32 is asked for by name.

    That is by ``float()``, ``to(torch.float32)`` and arguments ``dtype=torch.float32``, also where
    a tensor is made. Tensors that are there already, as rotary frequencies, keep their values.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with every fp32 among its arguments replaced."""
        if func is Tensor.float:
            return args[0].double()
        given = [torch.float64 if value is torch.float32 else value for value in args]
        named = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return func(*given, **named)


def normalized(norm: nn.Module, x_ND: Tensor) -> Tensor:
    """What an RMSNorm makes of its input before the gain, in the input's dtype."""
    return x_ND * torch.rsqrt(x_ND.pow(2).mean(-1, keepdim=True) + _epsilon(norm))


def _epsilon(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(getattr(norm, name, None), float):
            return cast(float, getattr(norm, name))
    raise ValueError(f"{type(norm).__name__} has neither variance_epsilon nor eps")
