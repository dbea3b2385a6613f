"""All that a step would ask of a GPU, in a form that is equal where a CUDA graph would do.

Operators and kernels in order, with sizes, strides and numbers; a tensor that was there before the
step is named by its address, one that the step made by its place among those. So two steps with
equal traces differ in what memory holds, and in nothing else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"),
    *("aten::lift_fresh", "aten::masked_select", "aten::_unique2", "aten::item"),
}
"""Operators that wait for the device, or take what Python has on the host."""


class Trace(TorchDispatchMode):
    """Of one step; ``note`` is for ``stubbed_step.stubbed``."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []
        self.forbidden: list[str] = []
        self._made: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        seen = self._shown((args, kwargs))
        result = func(*args, **kwargs)
        if name in FORBIDDEN or (name == "aten::_to_copy" and kwargs.get("device") is not None):
            self.forbidden.append(name)
        before = set(self._made)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            looks = isinstance(tensor, Tensor) and self._address(tensor) in self._inputs
            if isinstance(tensor, Tensor) and not looks and self._address(tensor) not in before:
                # held, so that its address is not given out again
                self._made[self._address(tensor)] = len(self._made), tensor
        self.events.append((name, seen))
        return result

    def note(self, kernel: Any, grid: Any, *arguments: Any, known: Any, **named: Any) -> None:
        """A kernel's launch."""
        self.events.append((kernel.fn.__name__, grid, self._shown((arguments, named))))

    def _shown(self, value: Any) -> Any:
        self._inputs: set[int] = set()
        return self._show(value)

    def _show(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._inputs.add(address := self._address(value))
            place = ("made", self._made[address][0]) if address in self._made else address
            shape = tuple(value.shape), value.stride(), value.storage_offset()
            return place, shape, str(value.dtype)
        if isinstance(value, (tuple, list)):
            return tuple(map(self._show, value))
        if isinstance(value, dict):
            return tuple((key, self._show(item)) for key, item in sorted(value.items()))
        return value if isinstance(value, (int, float, bool, str)) else str(value)

    @staticmethod
    def _address(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()
