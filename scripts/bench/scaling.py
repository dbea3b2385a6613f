"""How time and memory of ``rotq quantize`` grow with hidden size, depth and tokens.

    python scripts/bench/scaling.py --work /tmp/scaling -c gptq

A Llama of random weights (hidden 512, MLP 1792, two blocks, 2048 words) is quantized on 128 windows
of 256 tokens. One size at a time is doubled, twice; the MLP and the number of heads grow with the
hidden size. An exponent e says that twice the size takes 2^e times as much, of processor seconds
and of peak memory. What a job of next to nothing takes (hidden 64, one block) is subtracted first:
without that every exponent of a small job would be near 0. A second exponent is that of the larger
pair, where less is hidden by what does not grow.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from math import log2
from pathlib import Path

from shaped_model import Shape, run_job, write_model

BASE = Shape(
    hidden_size=512,
    intermediate_size=1792,
    num_attention_heads=8,
    num_key_value_heads=2,
    num_hidden_layers=2,
    vocab_size=2048,
)
LEAST = Shape(
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_hidden_layers=1,
    vocab_size=512,
)
LENGTH = 256
SIZES = ("hidden size", "depth", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of models and outputs")
    parser.add_argument("-c", dest="recipe", default="gptq")
    parser.add_argument("--size", dest="sizes", choices=SIZES, action="append", help="these alone")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--set", dest="choices", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()

    def cost(shape: Shape, windows: int) -> tuple[float, float]:
        return _cost(given.work, given.recipe, given.choices, shape, windows)

    least = cost(LEAST, 2)
    print(f"least job: {least[0]:.1f} s of processors, {least[1] / 1e9:.3f} GB", flush=True)
    base = cost(BASE, given.windows)
    for name in given.sizes or SIZES:
        found = [base]
        for factor in (2, 4):
            windows = given.windows * (factor if name == "tokens" else 1)
            found.append(cost(_grown(name, factor), windows))
        _print(name, found, least)


def _grown(name: str, factor: int) -> Shape:
    if name == "depth":
        return replace(BASE, num_hidden_layers=factor * BASE.num_hidden_layers)
    if name == "tokens":
        return BASE
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return replace(BASE, **{width: factor * getattr(BASE, width) for width in widths})


def _cost(
    work: Path, recipe: str, choices: list[str], shape: Shape, windows: int
) -> tuple[float, float]:
    """Processor seconds of all processes, and peak bytes of the job's."""
    model, out = work / "model", work / "out"
    for folder in (model, out):
        shutil.rmtree(folder, ignore_errors=True)
    write_model(model, shape)
    arguments = ["quantize", model, "-c", recipe, "-o", out, "--device", "cpu", "--json"]
    arguments += ["--num-samples", str(windows), "--seq-len", str(LENGTH)]
    for choice in choices:
        arguments += ["--set", choice]
    found = run_job(arguments)
    return found["cpu_seconds"], json.loads(found["output"])["peak_rss"]


def _print(name: str, found: list[tuple[float, float]], least: tuple[float, float]) -> None:
    for number, unit in enumerate(("s of processors", "bytes")):
        grown = [max(cost[number] - least[number], 1e-9) for cost in found]
        first, second = (log2(after / before) for before, after in pairwise(grown))
        values = ", ".join(f"{cost[number]:.4g}" for cost in found)
        print(f"{name}: {values} {unit}; exponents {first:.2f}, {second:.2f}", flush=True)


if __name__ == "__main__":
    main()
