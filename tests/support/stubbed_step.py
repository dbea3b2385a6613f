"""A decode step as it runs on a GPU, on a CPU: launches are counted and nothing is launched.

The packed cache takes a GPU's way, all but the kernels: its tensors are the CPU's, Triton's kernels
are replaced by a note of their names, and torch's operators are noted by a dispatch mode. So the
numbers are right, and the text is not.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rotq.kv.cache import attention, batched_encoding, encoded_layer
from rotq.kv.cache.encoded_layer import EncodedLayer
from rotq.kv.pool import packed
from rotq_kernels.kv.attention import packed_attention_triton
from rotq_kernels.kv.encode.launch import encode_kv_triton

FREE = {
    *("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"),
    *("aten::detach", "aten::lift_fresh", "aten::_unsafe_view"),
}
"""Operators that run no kernel, beside those that only look at memory in another way."""

WAITING = {"aten::_local_scalar_dense", "aten::_to_copy", "aten::nonzero"}
"""Operators that on a GPU wait for it, or copy from the host."""


class Log(TorchDispatchMode):
    """Notes operators that would run a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        looks = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        empty = isinstance(result, torch.Tensor) and not result.numel()
        if name not in FREE and not looks and not empty:
            self.found[name] += 1
        return result


@contextlib.contextmanager
def stubbed(
    launched: Counter[str], note: Callable[..., None] = lambda *_, **__: None
) -> Iterator[None]:
    """Within it caches take a GPU's way; kernels are noted in ``launched`` and not run.

    ``note`` is told of each launch what ``launch`` is told, but for ``on``.
    """

    def launch(
        kernel: Any, grid: Any, *arguments: Any, on: Any, known: Any = None, **named: Any
    ) -> None:
        launched[kernel.fn.__name__] += 1
        note(kernel, grid, *arguments, known=known, **named)

    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("rotq_kernels.")
        and hasattr(module, "launch")
        and "launching" not in name
    ]
    with contextlib.ExitStack() as stack:
        for module in modules:
            if callable(module.launch):
                stack.enter_context(patch.object(module, "launch", launch))
        stack.enter_context(patch.object(attention, "packed_attention", packed_attention_triton))
        for module in (batched_encoding, encoded_layer):
            stack.enter_context(patch.object(module, "encode_kv", encode_kv_triton))
        for module in (batched_encoding, packed):
            stack.enter_context(patch.object(module, "JOINED", ("cpu",)))
        yield


class StepCounts:
    """Of one decode step of a model with a packed cache: what its layers and its end launched."""

    def __init__(self) -> None:
        self.layers: Counter[str] = Counter()
        self.end: Counter[str] = Counter()

    def per_layer(self, number: int) -> float:
        """Launches of a layer, its share of the end included."""
        return (self.layers.total() + self.end.total()) / number


@torch.no_grad()
def counted_step(model: Any, cache: Any, run: Any) -> StepCounts:
    """Counts of the step that ``run`` makes; the cache must hold tokens, within ``stubbed``."""
    counts, launched = StepCounts(), Counter[str]()
    update, attend, encode = (
        EncodedLayer.update,
        attention.Visible.attend,
        batched_encoding.BatchedEncoder.encode,
    )

    def noted(call: Any, into: Counter[str]) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            launched.clear()
            with Log() as log:
                result = call(*args, **kwargs)
            into.update(log.found)
            into.update(launched)
            return result

        return wrapped

    with (
        stubbed(launched),
        patch.object(EncodedLayer, "update", noted(update, counts.layers)),
        patch.object(attention.Visible, "attend", noted(attend, counts.layers)),
        patch.object(batched_encoding.BatchedEncoder, "encode", noted(encode, counts.end)),
    ):
        run()
    return counts
