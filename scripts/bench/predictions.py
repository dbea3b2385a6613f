"""What ``rotq quantize --dry-run`` predicts, against the job that it is a prediction of.

    python scripts/bench/predictions.py MODEL -c rtn -c gptq --num-samples 16 --seq-len 512

One line for each recipe: peak memory of the job's process, and processor seconds of all its
processes, predicted and measured, and how far off the prediction is. With OMP_NUM_THREADS=1
processor time is the time of a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from shaped_model import run_job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("-c", dest="recipes", action="append", required=True)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--set", dest="choices", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    windows = ["--num-samples", str(given.num_samples), "--seq-len", str(given.seq_len)]
    shared = [*windows, "--dtype", given.dtype, "--device", "cpu", "--json"]
    for choice in given.choices:
        shared += ["--set", choice]
    for recipe in given.recipes:
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["quantize", given.model, "-c", recipe, *shared]
            told = json.loads(run_job([*arguments, "--dry-run"])["output"])
            out = Path(folder) / "out"
            found = run_job([*arguments, "-o", out])
            report = json.loads(found["output"])
            shutil.rmtree(out)
        _print(recipe, told, report["peak_rss"], found["cpu_seconds"])


def _print(recipe: str, told: dict[str, object], peak: int, seconds: float) -> None:
    predicted, phases = told["peak_memory_bytes"], told["seconds"]
    assert isinstance(predicted, int)
    assert isinstance(phases, dict)
    time = sum(phases.values())
    memory = f"memory {predicted / 1e9:.3f} of {peak / 1e9:.3f} GB ({predicted / peak - 1:+.0%})"
    processors = f"processors {time:.1f} of {seconds:.1f} s ({time / seconds - 1:+.0%})"
    print(
        f"{recipe}: {memory}, {processors}",
        {phase: round(spent, 1) for phase, spent in phases.items()},
        flush=True,
    )


if __name__ == "__main__":
    main()
