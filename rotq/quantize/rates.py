"""How fast this machine does what a job is made of, measured in some seconds.

Each rate is of the real code on a small problem, in seconds of one processor, so that other work on
the machine does not count. What a job needs of each is in ``job_seconds``.

Shape suffixes: M tokens, N out features, K in features.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rotq.formats.integer import Grid
from rotq.memory import trim_memory
from rotq.numerics import matmul_precision, single_threaded
from rotq.ops import pack
from rotq.recipe import Recipe
from rotq.solvers.curvature import Curvature
from rotq.solvers.parts import ROWS_IN_CACHE
from rotq.solvers.solve import solve
from rotq.solvers.statistics import Moments

WIDTH = 1024
"""Of the matrices that are multiplied, and of the layer that is solved."""
ELEMENTS = 1 << 22
"""Numbers of what is copied, hashed and packed."""
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Seconds of one processor for one unit."""

    start: float
    """Of a process: imports, the tokenizer, the model's structure."""
    compiling: float
    """Of the native loops that the recipe uses."""
    passes: float
    """A multiplication and addition of a forward pass."""
    moments: float
    """The same of fp32 in the calibration's precision."""
    single: float
    """The same of fp32."""
    double: float
    """The same of fp64."""
    solved: float
    """A number of a weight that is solved, products with its Hessian apart."""
    factored: float
    """An element of a Hessian that is factored, products apart."""
    simple: float
    """A number that is read, changed and written."""
    packed: float
    """A number that is packed."""
    hashed: float
    """A byte of a file that is read, hashed and written."""


def measure_rates(
    recipe: Recipe,
    grid: Grid,
    shape: tuple[int, int],
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
) -> Rates:
    """Time all of it, on one thread of the CPU; the process so far counts as its start.

    Args:
        grid: Of the layer that is solved.
        shape: (N, K) of that layer; what is solved here is no larger.
        dtype: Of activations.
        scale_dtype: Of stored scales.
    """
    start = time.process_time()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), single_threaded():
        a, b = (torch.randn(WIDTH, WIDTH, generator=generator) for _ in range(2))
        precision = recipe.calibration.precision
        cheap, short, exact = a.to(dtype), b.to(dtype), (a.double(), b.double())
        with matmul_precision(precision):
            passes = _seconds(lambda: cheap @ short) / WIDTH**3
            moments = _seconds(lambda: a @ b) / WIDTH**3
        single = _seconds(lambda: a @ b) / WIDTH**3
        double = _seconds(lambda: exact[0] @ exact[1]) / WIDTH**3
        x = torch.randn(ELEMENTS, generator=generator).to(dtype)
        codes = torch.randint(-4, 4, (ROWS_IN_CACHE, WIDTH), dtype=torch.int8, generator=generator)
        curvature, factoring = _factoring(recipe, grid, shape, generator)
        first, again, numbers, products = _solving(recipe, curvature, grid, shape, scale_dtype)
        K = _width(grid, shape)
        exact_products = numbers * K * recipe.solver.needs_original
        solved = max(0.0, again - products * single - exact_products * double) / numbers
        content = x.view(torch.uint8).numpy().data
        rates = Rates(
            start=start,
            compiling=max(0.0, first - again),
            passes=passes,
            moments=moments,
            single=single,
            double=double,
            solved=solved,
            factored=max(0.0, factoring - K**3 / 6 * double) / K**2,
            simple=_seconds(lambda: F.silu(x)) / ELEMENTS,
            packed=_seconds(lambda: pack(codes, 4)) / codes.numel(),
            hashed=_seconds(lambda: hashlib.sha256(content)) / len(content) * 1.5,
        )
    trim_memory()
    return rates


def products_of_solving(recipe: Recipe, N: int, K: int) -> float:
    """Multiplications with a Hessian (fp32) that solving a weight takes."""
    solver = recipe.solver
    if solver.method == "rtn":
        return 2.0 * N * K**2 * recipe.needs_data
    columns, judged = 0.5, 2.0 if solver.looks_at_hessian else 1.0
    sweeps = 3.5 * solver.refine_sweeps + 2.0 * (solver.refine_sweeps > 0)
    corrected = 1.0 if recipe.solver.needs_original else 0.0
    return (columns + judged + sweeps + corrected) * N * K**2


def _factoring(
    recipe: Recipe, grid: Grid, shape: tuple[int, int], generator: torch.Generator
) -> tuple[Curvature, float]:
    """What solving looks at, of random inputs, and the seconds that it took."""
    if not recipe.needs_data:
        return Curvature.of(None, recipe.solver), 0.0
    width, cross = _width(grid, shape), recipe.solver.needs_original
    moments = Moments(width, cross=cross, device=torch.device("cpu"))
    x_MK = torch.randn(2 * width, width, generator=generator)
    moments.add(x_MK, x_MK if cross else None, None)
    before = time.process_time()
    curvature = Curvature.of(moments, recipe.solver, spend=True)
    return curvature, time.process_time() - before


def _solving(
    recipe: Recipe, curvature: Curvature, grid: Grid, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[float, float, int, float]:
    """Seconds of solving rows for the first time and again; numbers and products in them."""
    rows, width = min(ROWS_IN_CACHE, shape[0]), _width(grid, shape)
    weight_NK = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))

    def run() -> None:
        solve(weight_NK, curvature, grid, recipe.solver, scale_dtype=dtype)

    first, again = _once(run), _seconds(run)
    return first, again, rows * width, products_of_solving(recipe, rows, width)


def _width(grid: Grid, shape: tuple[int, int]) -> int:
    """Columns of the layer that is solved: whole groups."""
    most, size = min(WIDTH, shape[1]), grid.group_size
    return most if size < 1 else most // size * size


def _seconds(action: Callable[[], object]) -> float:
    """Of one processor, the least of some runs."""
    return min(_once(action) for _ in range(REPEATS))


def _once(action: Callable[[], object]) -> float:
    before = time.process_time()
    action()
    return time.process_time() - before
