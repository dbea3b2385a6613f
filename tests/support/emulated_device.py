"""A GPU that this machine does not have: tensors that say they are on it, computed by the CPU.

What a device would refuse is refused: an operator on tensors of two places, and fp64 on ``mps``.
Numbers are the CPU's. Kernels of the device, its memory and its speed are not emulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

MIXING = {"_to_copy", "copy_", "index", "index_put_", "index_put", "_index_put_impl_"}
"""Operators that take tensors of two places: copies, and indices on the CPU."""


class Emulated(Tensor):
    """A tensor on a device that is not there."""

    held: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Emulated:
        if held.dtype == torch.float64 and device.type == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        made: Emulated = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="cpu"
        )
        made.held, made.place = held, device
        return made

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["held"], self.place

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], place: torch.device, size: Any, stride: Any
    ) -> Emulated:
        return Emulated(inner["held"], place)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """As Python sees it; torch itself would look for the device."""
        return self.place

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        device = next(x.device for x in tensors if isinstance(x, Emulated))
        name = func._schema.name.split("::")[1]
        others = [x for x in tensors if not isinstance(x, Emulated) and x.dim()]
        if others and name not in MIXING:
            raise RuntimeError(f"{name}: expected all tensors on {device}, found one on the CPU")
        if name == "copy_" and not isinstance(args[0], Emulated):
            args[0].copy_(args[1].held)
            return args[0]
        to = kwargs.pop("device", None)
        leaves = to is not None and torch.device(to).type == "cpu"
        written = [x for x in tensors if isinstance(x, Emulated)]
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if leaves:
            return found
        by_held = {id(x.held): x for x in written}

        def put(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return by_held[id(x)] if id(x) in by_held else Emulated(x, device)

        return tree_map(put, found)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Emulated) else x


class _Factories(TorchFunctionMode):
    """Functions that are given the device as an argument, which torch would look for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._has_compatible_shallow_copy_type:  # modules swap their tensors then
            return False
        if func is torch.Tensor.tolist:  # which reads memory without asking an operator
            return _held(args[0]).tolist()
        if func is torch.Tensor.to:
            for x in args[1:]:
                if isinstance(x, torch.device | str | Tensor):
                    kwargs["device"] = x.device if isinstance(x, Tensor) else x
                if isinstance(x, torch.dtype | Tensor):
                    kwargs["dtype"] = x.dtype if isinstance(x, Tensor) else x
            args = args[:1]
            if isinstance(args[0], Emulated) and str(kwargs.get("device")) == "cpu":
                args = (args[0].held.clone(),)
        if func is torch.Tensor.backward:
            return self._run_backward(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return _held(args[0]).clone()
        if self._is_ours(kwargs.get("device")):
            del kwargs["device"]
            found = func(*args, **kwargs)
            return found if isinstance(found, Emulated) else Emulated(found, self.device)
        return func(*args, **kwargs)

    def _run_backward(self, output: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
        """torch's, where what the pass calls finds the device as well.

        By its engine: every function above is one that torch takes the mode away for.
        """
        given = torch.ones_like(output) if gradient is None else gradient
        how = {"allow_unreachable": True, "accumulate_grad": True}
        with self:
            _engine_run_backward((output,), (given,), False, False, (), **how)

    def _is_ours(self, device: Any) -> bool:
        return device is not None and torch.device(device).type == self.device.type


def moved(model: nn.Module, name: str) -> nn.Module:
    """The model itself, its parameters and buffers on an emulated device."""
    device = torch.device(name)
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:
                held = Emulated(parameter.data, device)
                module._parameters[key] = nn.Parameter(held, requires_grad=False)
        for key, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[key] = Emulated(buffer, device)
    return model


@contextmanager
def emulated(name: str) -> Iterator[torch.device]:
    """Make a device of this name, as ``cuda:0``, one that tensors can be put on."""
    device = torch.device(name)
    with _Factories(device), torch.no_grad():
        yield device
