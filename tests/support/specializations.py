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

    def note(self, kernel: Any, grid: Any, *arguments: Any, **named: Any) -> None:
        """A launch."""
        _, specialization, options = _binder(kernel)(*arguments, **named)
        self.found[kernel.fn.__name__].add(f"{specialization} {sorted(options.items())}")

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
