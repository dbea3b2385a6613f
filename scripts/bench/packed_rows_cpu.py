"""Proteins of mixed lengths through an ESM on a CPU: padded as they come, padded in order, packed.

    python scripts/bench/packed_rows_cpu.py --shape 8M --proteins 48

Random proteins of 50 to 1000 residues, lengths uniform, in random order; an ESM-2 of the shape
asked for with random weights, fp32. ``as they come`` is a plain loop over transformers: batches of
--batch proteins in the order of the file, padded to the longest. ``in order`` sorts them by length
first and fills passes of --tokens tokens, padding counted; ``packed`` is what rotq does
(``evaluation.passes``). The three take turns; the figure is the median of --repeats rounds, in
seconds, without the first.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from transformers import EsmConfig, EsmForMaskedLM

from rotq.calibration.batches import filled, padded
from rotq.evaluation.passes import batches_of_rows, run_batch, run_rows

SHAPES = {"8M": (6, 320, 20), "35M": (12, 480, 20), "150M": (30, 640, 20), "650M": (33, 1280, 20)}
"""Blocks, width and heads of ESM-2."""
PAD = 1


def esm(shape: str, blocks: int = 0) -> EsmForMaskedLM:
    """Random weights; so many blocks, or 0 for all."""
    all_blocks, width, heads = SHAPES[shape]
    config = EsmConfig(
        vocab_size=33,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks or all_blocks,
        num_attention_heads=heads,
        position_embedding_type="rotary",
        token_dropout=True,
        mask_token_id=32,
        pad_token_id=PAD,
        emb_layer_norm_before=False,
    )
    torch.manual_seed(0)
    return EsmForMaskedLM(config).eval()


def proteins(number: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(50, 1001, (number,), generator=generator).tolist()
    return [torch.randint(4, 24, (n + 2,), generator=generator).tolist() for n in lengths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="8M")
    parser.add_argument("--proteins", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    model, rows = esm(arguments.shape), proteins(arguments.proteins)
    size = arguments.batch
    as_they_come = [list(range(n, min(n + size, len(rows)))) for n in range(0, len(rows), size)]
    batches = {
        "as they come": as_they_come,
        "in order": filled(rows, arguments.tokens),
        "packed": batches_of_rows([model], rows, arguments.tokens),
    }

    def plain(chosen: list[int]) -> None:
        run_batch(model, padded([rows[index] for index in chosen], PAD, frozenset()))

    def packed(chosen: list[int]) -> None:
        run_rows(model, [rows[index] for index in chosen], PAD)

    passes: dict[str, Callable[[list[int]], None]] = {"packed": packed}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    with torch.inference_mode():
        for _ in range(arguments.repeats + 1):
            for name, groups in batches.items():
                started = time.perf_counter()
                for chosen in groups:
                    passes.get(name, plain)(chosen)
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    report = {
        "shape": arguments.shape,
        "proteins": len(rows),
        "tokens": sum(map(len, rows)),
        "seconds": median,
        "packed_faster": {name: median[name] / median["packed"] for name in batches},
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
