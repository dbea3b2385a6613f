"""The Hadamard transform of rows on a CPU: fast, as a dense product, and a DCT.

    python scripts/bench/hadamard_cpu.py [--rows 128] [--csv out/hadamard.csv]

One JSON line per size, also as CSV. Times are the best of --repeats calls in fp32, in ms; rounds of
all three alternate, so that a busy machine disturbs all alike. ``per_step`` is the fast transform's
time in ns per element and log2(n): it is constant where the cost grows as n log n; a core of order
m adds m / log2(n) products to it. ``scipy.fft.dct`` is an O(n log n) yardstick, not the same
transform. Sizes whose dense matrix would not fit --dense-limit have no dense time.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy.fft
import torch

from rotq.rotations.hadamard import core_order, fast_hadamard, hadamard

SIZES = (512, 1024, 2048, 4096, 8192, 16384, 576, 1536, 5632, 14336, 11008, 22016, 44032)
"""Powers of two; the MLPs of SmolLM2, TinyLlama, Llama 3; Llama 2's core of 344 three times."""


def best_ms(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Of ``repeats`` rounds after one that is not counted."""
    best = dict.fromkeys(calls, math.inf)
    for round_number in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if round_number:
                best[name] = min(best[name], 1e3 * (time.perf_counter() - started))
    return best


def measure(n: int, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the result."""
    x = torch.randn(options.rows, n, generator=torch.Generator().manual_seed(n))
    calls: dict[str, Callable[[], Any]] = {
        "fast": lambda: fast_hadamard(x),
        "dct": lambda: scipy.fft.dct(x.numpy(), norm="ortho"),
    }
    best = best_ms(calls, options.repeats)
    dense = None
    if n <= options.dense_limit:
        H = hadamard(n).float() / math.sqrt(n)
        rounds = calls | {"dense": lambda: x @ H}
        both = best_ms(rounds, max(3, options.repeats // 4))
        dense = both["dense"]
        best = {name: min(best[name], both[name]) for name in best}
    steps = options.rows * n * math.log2(n)
    return {
        "op": "hadamard_cpu",
        "n": n,
        "core": core_order(n),
        "rows": options.rows,
        "fast_ms": round(best["fast"], 3),
        "dense_ms": None if dense is None else round(dense, 3),
        "dct_ms": round(best["dct"], 3),
        "speedup": None if dense is None else round(dense / best["fast"], 1),
        "per_step": round(1e6 * best["fast"] / steps, 3),
        "dct_per_step": round(1e6 * best["dct"] / steps, 3),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dense-limit", type=int, default=11008, help="largest dense matrix")
    parser.add_argument("--csv", type=Path, help="write rows to this file")
    options = parser.parse_args()
    rows = []
    for n in SIZES:
        rows.append(measure(n, options))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
