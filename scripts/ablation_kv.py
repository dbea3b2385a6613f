"""What each part of the packed KV cache is worth: one JSON line a row, appended; rows that are
there already are skipped, so that an interrupted run goes on.

    python scripts/ablation_kv.py MODEL --calibration wiki.txt --text test.txt --out kv.jsonl
    python scripts/ablation_kv.py MODEL ... --only k3v3,mean-static --windows 4

Statistics are collected once; rows are measured ``--batch`` at a time against one reference.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from rotq.calibration.data import load_windows
from rotq.calibration.texts import read_text
from rotq.calibration.tokenized import tokenize
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.evaluation.kv import evaluate_kv
from rotq.evaluation.perplexity import Protocol
from rotq.evaluation.quantized_history import scheme_of
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.calibration.statistics import collect
from rotq.kv.presets import PRESETS, preset
from rotq.models.limits import limits_of
from rotq.recipe import Calibration

OURS = preset("k3v3")
NO_METRIC = {"alpha": 0.0, "beta": 0.0, "value_metric": False, "search": 0}
BIT = {"search": 0, "residual": "qjl"}

CHANGES = {
    "mean-none": {"mean": "none"},
    "mean-static": {"mean": "static"},
    "value-mean-none": {"value_mean": False},
    "no-metric": NO_METRIC,
    "no-metric mean-static": {**NO_METRIC, "mean": "static"},
    "no-metric mean-none": {**NO_METRIC, "mean": "none", "value_mean": False},
    "query-metric 0.5": {**NO_METRIC, "alpha": 0.5},
    "query-metric 1.0": {**NO_METRIC, "alpha": 1.0},
    "balanced 0.5": {**NO_METRIC, "alpha": 0.5, "beta": 1.0},
    "balanced 0.3": {**NO_METRIC, "alpha": 0.3, "beta": 1.0},
    "search-0": {"search": 0},
    "search-1": {"search": 1},
    "search-2": {"search": 2},
    "search-8": {"search": 8},
    "search-16": {"search": 16},
    "value-metric-none": {"value_metric": False},
    "norm-fp16": {"norm": "float16"},
    "gain-norm": {"search": 0, "gain": "norm"},
    "gain-none": {"search": 0, "gain": "none"},
    "k3+sign": {"search": 0, "residual": "sign"},
    "k3+qjl": BIT,
    "k3+qjl unbiased": {**BIT, "residual_scale": "unbiased"},
    "k3+qjl gaussian": {**BIT, "residual_scale": "unbiased", "sketch": "gaussian"},
    "k2+sign": {"search": 0, "residual": "sign", "k_bits": 2},
    "k2+qjl": {**BIT, "k_bits": 2},
    "k2+qjl unbiased": {**BIT, "k_bits": 2, "residual_scale": "unbiased"},
    "sinks-0": {"sinks": 0},
    "sinks-1": {"sinks": 1},
    "sinks-8": {"sinks": 8},
    "boundary-2x8bit": {"boundary": 2},
}
"""From k3v3, by row."""

WINDOWED = ("k3v3", "k4v3", "k2v2", "turboquant", "turboesm")
"""Measured with a recent window of 128 tokens too."""


def rows():
    specs = {name: preset(name) for name in PRESETS}
    specs |= {name: replace(OURS, name=name, **change) for name, change in CHANGES.items()}
    for name in WINDOWED:
        specs[f"{name} recent-128"] = replace(preset(name), name=f"{name} recent-128", recent=128)
    return specs


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--num-samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--text", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", help="rows, by comma")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()

    specs = rows()
    wanted = args.only.split(",") if args.only else list(specs)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {json.loads(line)["preset"] for line in lines}
    todo = [name for name in wanted if name not in done]
    if not todo:
        return
    model = load_model(args.model, dtype="float32")
    tokenizer = load_tokenizer(args.model)
    drawn = load_windows(
        Calibration(source=args.calibration, num_samples=args.num_samples, seq_len=1024, seed=0),
        tokenizer,
        limits_of(model),
    )
    statistics = collect(model, drawn.ids_BT, sinks=OURS.sinks)
    ids_N = tokenize(read_text(args.text, split="test"), tokenizer)
    protocol = Protocol(windows=args.windows, seq_len=args.seq_len)
    for first in range(0, len(todo), args.batch):
        schemes = [
            scheme_of(calibrate(model, drawn.ids_BT, specs[name], statistics=statistics))
            for name in todo[first : first + args.batch]
        ]
        with args.out.open("a") as out:
            for found in evaluate_kv(model, ids_N, schemes, protocol=protocol):
                row = {**found.to_dict(), "calibration": args.calibration}
                out.write(json.dumps(row) + "\n")
                print(row["preset"], row["kl"], row["ppl_ratio"], flush=True)


if __name__ == "__main__":
    main()
