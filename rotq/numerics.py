"""Products and inverses of matrices as exact as a stretch of code needs them; torch's threads.

Inverses are by QR, never by LU. The LU factorization of torch 2.13's CPU build (oneMKL 2024.2) is
wrong from order 192 on where it runs on two or more cores: ``torch.linalg.inv`` and ``solve``
return numbers that have nothing to do with their input, without an error. QR, Cholesky and
eigenvalues are right there (docs/log.md).
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")
Result = TypeVar("Result")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's fp32 matrix product precision ("highest" or "medium") and put it back.

    "medium" multiplies in bf16 and sums in fp32: twice as fast where the CPU has AVX512-BF16;
    hardware without it computes in fp32 or TF32 by torch's own choice.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def inverse(matrix: Tensor) -> Tensor:
    """A^-1 = R^-1 Q^T of square matrices (..., K, K), in their dtype."""
    q, r = torch.linalg.qr(matrix)
    return torch.linalg.solve_triangular(r, q.mT, upper=True)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Compute every operator of torch on one thread of the CPU, and put the number back.

    Threads that share a small operator meet at its end. On a machine that does something else too
    one of them waits there for its turn, thousands of times in a loop over columns: two threads
    then take ten times as long as one (docs/log.md). No result changes: operators whose sums depend
    on the number of threads are not used in small pieces.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(function: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """``[function(part) for part in parts]`` with a part on each of torch's threads.

    Every operator inside has one thread of its own, so that no two ever wait for each other.

    Args:
        function: Safe to run at the same time for different parts; computes on the CPU. Its
            gradient mode and context variables are the caller's.
        parts: Independent pieces of work of about the same size.

    Raises:
        Exception: what ``function`` raises for the first part that fails.
    """
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    context = copy_context()

    def run(part: Part) -> Result:
        with torch.set_grad_enabled(gradients):
            return context.copy().run(function, part)

    with single_threaded(), ThreadPoolExecutor(threads, thread_name_prefix="rotq-solver") as pool:
        return list(pool.map(run, parts))
