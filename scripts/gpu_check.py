"""Everything about rotq that only a GPU can show, in nine minutes, most valuable first.

    python scripts/gpu_check.py [--seconds 540] [--only C,T] [--json out/gpu.json] [--model FOLDER]
    python scripts/gpu_check.py --dry

First what is right (compilation, each kernel against an fp64 oracle, repeats, the sanitizer, CUDA
graphs), then what it takes (parts of a decode step, splits, prefill, linear layers, rotations),
then models from end to end. Every line is printed at once; a step that fails does not end the
others, and one for which no time is left is named. The exit status is the number of failures, at
most 100. ``--dry`` runs the same lines in Triton's interpreter with tiny sizes, so that the script
has no fault of its own when it meets a GPU. docs/gpu.md says what was modelled.

It needs torch, triton, transformers and rotq, no network, and no other package.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="interpreter, tiny sizes, no GPU")
    parser.add_argument("--seconds", type=float, default=540, help="start no step after these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--only", default="", metavar="C,T", help="steps by the start of their name"
    )
    parser.add_argument("--model", type=Path, help="a model's folder for E; random weights if none")
    return parser.parse_args()


def main() -> int:
    """Run the steps; the exit status."""
    given = parsed()
    if given.dry:
        # before Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for folder in (ROOT, ROOT / "kernels", ROOT / "tests" / "support"):
        sys.path.insert(0, str(folder))

    import torch

    if not given.dry and not torch.cuda.is_available():
        sys.stderr.write("gpu_check: no CUDA device; --dry runs in Triton's interpreter\n")
        return 2

    from gpu.correctness import CORRECTNESS
    from gpu.figures import figures
    from gpu.models import MODELS
    from gpu.runner import Run
    from gpu.timing import TIMING

    run = Run(dry=given.dry, seconds=given.seconds, model=given.model)
    wanted = tuple(name for name in given.only.split(",") if name)
    for name, (limit, step) in (CORRECTNESS | TIMING | MODELS).items():
        if not wanted or name.startswith(wanted):
            run.step(name, limit, step)
    run.say("end", figures(run.results))
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(run.report(), indent=1) + "\n", encoding="utf-8")
    return min(run.failures, 100)


if __name__ == "__main__":
    sys.exit(main())
