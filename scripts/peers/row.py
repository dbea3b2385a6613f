"""Run one baseline, evaluate the model it wrote and append a line to a results file."""

import argparse
import json
import subprocess
import sys
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter of the tool's environment"
    )
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration-ids", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="reference log-probabilities")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--timeout", type=float, default=1500)
    parser.add_argument("--note", default="")
    args, extra = parser.parse_known_args()

    tool = [
        args.python,
        args.script,
        "--model",
        args.model,
        "--calibration-ids",
        args.calibration_ids,
    ]
    subprocess.run([*tool, "--out", args.out, *extra], check=True, timeout=args.timeout)
    evaluate = [
        sys.executable,
        Path(__file__).with_name("eval.py"),
        "--model",
        args.out,
        "--reference",
        args.model,
    ]
    evaluate += ["--text", args.text, "--cache", args.cache]
    score = subprocess.run(evaluate, check=True, stdout=subprocess.PIPE, text=True).stdout
    row = json.loads((args.out / "run.json").read_text()) | json.loads(score.splitlines()[-1])
    row |= {"note": args.note, "row": args.out.name}
    with args.results.open("a") as results:
        results.write(json.dumps(row) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
