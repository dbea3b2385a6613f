"""Quantize one model once per row of an ablation and score each result against the original.

    python scripts/ablation.py --model DIR --calibration FILE --text FILE --results ablation.jsonl
    python scripts/ablation.py ... --rows base,target --seeds 0,1,2 --set weights.group_size=-1

Each row changes one switch of the row before it (ROWS). One JSON line per row and seed is appended
to the results file as soon as it is there, and rows that are in it already are not run again.
"""

import argparse
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from torch import Tensor

from rotq.calibration.texts import read_text
from rotq.calibration.tokenized import tokenize
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.disk.files import remove
from rotq.evaluation.perplexity import Evaluation, Protocol, evaluate
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import load_recipe
from rotq.recipe.calibration import Strategy
from rotq.report.progress import PlainProgress

BASE = {
    "weights.bits": 3,
    "weights.group_size": 64,
    "solver.scale_search": "minmax",
    "solver.order": "natural",
}
SEARCH = {**BASE, "solver.order": "activation", "solver.scale_search": "hessian"}
TARGET = {**SEARCH, "solver.target_correction": 0.5}
REFINE = {**TARGET, "solver.refine_sweeps": 3}
ROTATE_VALUES = {**REFINE, "rotation.value": "hadamard"}
ROTATE = {**ROTATE_VALUES, "rotation.residual": "hadamard"}
ROWS = {
    "rtn": {**BASE, "solver.method": "rtn"},
    "base": BASE,
    "order": {**BASE, "solver.order": "activation"},
    "search": SEARCH,
    "target": TARGET,
    "refine": REFINE,
    **{
        strategy: {**REFINE, "importance.strategy": strategy}
        for strategy in get_args(Strategy)
        if strategy != "none"
    },
    "rotate_values": ROTATE_VALUES,
    "rotate": ROTATE,
    "rotate_attention": {**ROTATE, "importance.strategy": "attention"},
    "tune": {**REFINE, "tuning.steps": 48, "tuning.seq_len": 512},
    "codes": {**REFINE, "tuning.code_steps": 64},
    "gradient_codes": {
        **REFINE,
        "importance.strategy": "gradient",
        "tuning.code_steps": 64,
    },
    "target_025": {**REFINE, "solver.target_correction": 0.25},
    "target_075": {**REFINE, "solver.target_correction": 0.75},
    "target_100": {**REFINE, "solver.target_correction": 1.0},
    "passes_3": {**REFINE, "solver.passes": 3},
}


def main(rows: dict[str, dict[str, Any]] = ROWS, described: str = str(__doc__)) -> Path:
    """Run what is asked for on the command line; returns the results file."""
    parser = argparse.ArgumentParser(description=described.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="dense checkpoint folder")
    parser.add_argument("--calibration", required=True, help="text the windows are drawn from")
    parser.add_argument("--text", required=True, help="text to score on")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines to append to")
    parser.add_argument("--work", type=Path, default=Path("out/ablation"))
    parser.add_argument("--rows", default=",".join(rows), help=f"of {', '.join(rows)}")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024, help="of calibration windows")
    parser.add_argument("--dtype", default="auto", help="of the job and the scoring")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    shared = dict(setting.split("=", 1) for setting in arguments.set)
    for seed in map(int, arguments.seeds.split(",")):
        for name in arguments.rows.split(","):
            row = {
                "row": name,
                "seed": seed,
                "num_samples": arguments.num_samples,
                "seq_len": arguments.seq_len,
                "windows": arguments.windows,
                "dtype": arguments.dtype,
                "set": shared,
            }
            if not _is_done(row, arguments.results):
                figures = _run({**rows[name], **shared}, row, arguments)
                with arguments.results.open("a", encoding="utf-8") as results:
                    results.write(json.dumps({**row, **figures}) + "\n")
                print(json.dumps({**row, **figures}), flush=True)
    return Path(arguments.results)


def _is_done(row: dict, results: Path) -> bool:
    if not results.is_file():
        return False
    lines = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return any(all(line.get(key) == value for key, value in row.items()) for line in lines)


def _run(choices: dict, row: dict, arguments: argparse.Namespace) -> dict:
    calibration = {
        "calibration.source": arguments.calibration,
        "calibration.num_samples": row["num_samples"],
        "calibration.seq_len": row["seq_len"],
        "calibration.batch_size": 2,
        "calibration.seed": row["seed"],
        "rotation.seed": row["seed"],
    }
    recipe = load_recipe(None, {**choices, **calibration})
    output = arguments.work / "checkpoint"
    report = quantize_model(
        arguments.model,
        recipe,
        output,
        dtype=arguments.dtype,
        resume="never",
        overwrite=True,
        progress=PlainProgress(),
    )
    found = _score(output, arguments)
    remove(output)
    return {
        "ppl": found.ppl,
        "kl": found.kl,
        "top1": found.top1,
        "seconds": round(report.seconds),
        "transform_seconds": round(report.transform.get("seconds", 0)),
        "bits_per_weight": report.bits_per_weight,
        "bits_per_weight_all_in": report.bits_per_weight_all_in,
    }


class _Remembered:
    """A model that computes the logits of a window once; 0.2 GB a window with SmolLM2."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen: dict[tuple[int, ...], Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        key = tuple(input_ids.flatten().tolist())
        if key not in self.seen:
            self.seen[key] = self.model(input_ids=input_ids, use_cache=use_cache).logits
        return SimpleNamespace(logits=self.seen[key])


@functools.cache
def _original(model: Path, dtype: str) -> _Remembered:
    """What every row is scored against."""
    return _Remembered(_loaded(model, dtype))


def _loaded(model: Path, dtype: str) -> Any:
    # dense weights give equal results, and are not unpacked again for every window
    return load_model(model, dtype=dtype, device_map=None, trust_remote_code=False, packed=False)


def _score(output: Path, arguments: argparse.Namespace) -> Evaluation:
    tokenizer = load_tokenizer(output, trust_remote_code=False)
    return evaluate(
        _loaded(output, arguments.dtype),
        tokenize(read_text(arguments.text, split="test"), tokenizer),
        protocol=Protocol(windows=arguments.windows, seq_len=1024),
        reference=_original(arguments.model, arguments.dtype),
    )


if __name__ == "__main__":
    main()
