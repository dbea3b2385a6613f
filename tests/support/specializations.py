"""What Triton would compile, by its own rules, without a GPU: the keys of kernels' variants.

Triton compiles a kernel anew for each set of constants, types, alignments and small numbers among
its arguments. A launch that meets a new set in the middle of a text stops it for seconds.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


class Variants:
    """Keys that launches have met, by kernel; ``note`` is for ``stubbed_step.stubbed``."""

    def __init__(self) -> None:
        self.found: defaultdict[str, set[str]] = defaultdict(set)
        self.known: list[Any] = []
        self.keys: defaultdict[Any, set[str]] = defaultdict(set)
        """Of launches that took a kernel from the same memory, which must be one."""

    def note(self, kernel: Any, grid: Any, *arguments: Any, known: Any, **named: Any) -> None:
        """A launch."""
        bound, specialization, options = _binder(kernel)(*arguments, **named)
        name, key = kernel.fn.__name__, f"{specialization} {sorted(options.items())}"
        self.found[name].add(key)
        if known is not None:
            # held, so that its id is not given out again
            self.known.append(known)
            self.keys[id(known), name].add(key)
            assert len(grid) == 3
            assert list(bound)[len(arguments) :] == [n for n in bound if n in named]

    def counts(self) -> dict[str, int]:
        """Variants of each kernel."""
        return {name: len(keys) for name, keys in self.found.items()}


@functools.cache
def _binder(kernel: Any) -> Any:
    """Triton's own, for sm_90; in the interpreter kernels have none."""
    if not isinstance(kernel, JITFunction):
        kernel = JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)
