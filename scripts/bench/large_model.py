"""Two blocks of a 70B model through ``rotq quantize``, and the memory that the job needed.

    python scripts/bench/large_model.py --work /tmp/large -c rtn -c gptq

The checkpoint has the shapes of Llama-3-70B (hidden 8192, MLP 28672, 64 heads, 8 of keys and
values, vocabulary 128256, no tied head) and random bf16 weights: 7.6 GB. A model of eighty such
blocks needs the same memory, and forty times the time. Printed are the peaks of the job itself (its
report) and of all its processes (the check in a fresh process included) against the bar: one block
in fp32 and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from shaped_model import Shape, run_job, write_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of model and outputs")
    parser.add_argument("-c", dest="recipes", action="append", help="preset; several times")
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=1, help="divide all widths by this")
    parser.add_argument("--set", dest="choices", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--profile", action="store_true", help="print what each phase raised")
    given = parser.parse_args()
    shape = Shape(
        hidden_size=8192 // given.shrink,
        intermediate_size=28672 // given.shrink,
        num_attention_heads=64 // given.shrink,
        num_key_value_heads=max(1, 8 // given.shrink),
        num_hidden_layers=given.blocks,
        vocab_size=128256 // given.shrink,
    )
    model = given.work / f"model-{given.shrink}-{given.blocks}"
    write_model(model, shape)
    bar = 4 * shape.block_parameters + 2 * 10**9
    print(f"one block: {shape.block_parameters / 1e9:.3f} G parameters; bar {bar / 1e9:.2f} GB")
    for recipe in given.recipes or ["rtn"]:
        _run(recipe, model, given, bar)


def _run(recipe: str, model: Path, given: argparse.Namespace, bar: int) -> None:
    out = given.work / f"out-{recipe}"
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["quantize", model, "-c", recipe, "-o", out, "--resume", "never", "--device", "cpu"]
    arguments += ["--num-samples", str(given.num_samples), "--seq-len", str(given.seq_len)]
    for choice in ("calibration.batch_size=1", *given.choices):
        arguments += ["--set", choice]
    if given.profile:
        arguments += ["--profile", given.work / f"trace-{recipe}.json"]
    predicted = json.loads(run_job([*_dry(arguments), "--dry-run", "--json"])["output"])
    found = run_job([*arguments, "--json"])
    report = json.loads(found["output"])
    print(
        f"{recipe}: job {report['peak_rss'] / 1e9:.2f} GB, with the check {found['peak'] / 1e9:.2f}"
        f" GB, predicted {predicted['peak_memory_bytes'] / 1e9:.2f} GB, bar {bar / 1e9:.2f} GB; "
        f"{found['seconds']:.0f} s, {found['cpu_seconds']:.0f} of CPU",
        flush=True,
    )


def _dry(arguments: list[str | Path]) -> list[str | Path]:
    """Without what a dry run does not take."""
    if "--profile" not in arguments:
        return arguments
    place = arguments.index("--profile")
    return arguments[:place] + arguments[place + 2 :]


if __name__ == "__main__":
    main()
