"""Seconds of the first call of each kind of native loop: compiled, and taken from the disk.

    python scripts/bench/native_start.py

Two processes after each other share an empty folder for what numba keeps. Processor time.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from rotq_kernels.kv.encode.native_search import search_codes_native
from rotq_kernels.rounding import native, two_sided
from rotq_kernels.trellis.native_linear import levels_native, product_native
from rotq_kernels.trellis.search import search_paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", action="store_true", help="time the calls of this process")
    if parser.parse_args().child:
        for name, call in calls().items():
            began = time.process_time()
            call()
            print(f"{name}\t{time.process_time() - began:.2f}")
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [child(folder) for _ in range(2)]
    print(f"{'':24} compiled  from the disk")
    for name, compiled in rows[0].items():
        print(f"{name:24} {compiled:8.2f}  {rows[1][name]:13.2f}")
    print(f"{'all':24} {sum(rows[0].values()):8.2f}  {sum(rows[1].values()):13.2f}")


def child(folder: str) -> dict[str, float]:
    """Seconds by kind, of a new process."""
    result = subprocess.run(
        [sys.executable, __file__, "--child"],
        env=os.environ | {"NUMBA_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.split("\t") for line in result.stdout.splitlines())
    return {name: float(seconds) for name, seconds in lines}


def calls() -> dict[str, Callable[[], object]]:
    """The first begins numba, too."""
    w_BN, one_BN, unit_BB = torch.randn(128, 512), torch.ones(128, 512), torch.eye(128)
    bounds_2N = torch.stack((torch.zeros(512), torch.full((512,), 7.0)))
    one_CNG, block_Ggg = torch.ones(48, 512, 2), torch.eye(64).expand(2, 64, 64).contiguous()
    row_NN, words_WK = torch.eye(512), torch.zeros(48, 512, dtype=torch.int32)
    y_BHTD, metric_HDD = torch.randn(2, 3, 64, 64), torch.eye(64).expand(3, 64, 64)
    codes_BHTD = torch.zeros(y_BHTD.shape, dtype=torch.uint8)
    threshold_HE, value_HL = torch.linspace(-3, 3, 7).expand(3, 7), torch.arange(8.0).expand(3, 8)
    return {
        "GPTQ's columns": lambda: native.round_block(
            w_BN, unit_BB, one_BN, one_BN, bounds_2N, torch.empty(128, 512)
        ),
        "sweeps": lambda: native.refine_block(
            w_BN, unit_BB, one_BN, one_BN, (0, 7), torch.zeros(128, 512)
        ),
        "candidates for scales": lambda: native.best_candidates(
            torch.randn(512, 2, 64), one_CNG, one_CNG, block_Ggg, (0, 7)
        ),
        "unpacking": lambda: native.unpacked_levels(words_WK.T.contiguous(), None, 3, (512, 8, 64)),
        "two-sided columns": lambda: two_sided.round_column(
            w_BN[0], row_NN, one_BN[0], one_BN[0], bounds_2N, torch.empty(512)
        ),
        "search, L = 12, 3 bits": lambda: search_paths(torch.randn(2, 128), 3, 12),
        "levels of paths": lambda: levels_native(words_WK, 512, 512, 3, 12),
        "products with paths": lambda: product_native(
            torch.randn(1, 512), words_WK, torch.ones(512, 1), 3, 12
        ),
        "search of a KV cache": lambda: search_codes_native(
            y_BHTD, codes_BHTD, metric_HDD, torch.ones(3), 4, threshold_HE, value_HL
        ),
    }


if __name__ == "__main__":
    main()
