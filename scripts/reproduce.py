"""A paper's table beside ours: its rows with its own settings, and which of its claims hold here.

    python scripts/reproduce.py quarot --model DIR --calibration FILE --text FILE
    python scripts/reproduce.py gptq --model DIR --calibration FILE --text FILE \\
        --num-samples 16 --calibration-seq-len 512 --peer GPTQModel=ENV/bin/python
    python scripts/reproduce.py turboesm --model ESM2 --calibration FASTA

Recipes are configs/papers/*.yaml, what papers print is scripts/papers.yaml. Perplexities of other
models do not compare; what does is the order of the rows, and the share of the gap between the
worst row and the original that each closes, in logarithms. --num-samples and --calibration-seq-len
make a run smaller than the paper's, and the table says so. A run that was stopped goes on: rows are
kept in --work.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from rotq.errors import RotqError
from rotq.kv.presets import PRESETS, KVSpec

ROOT = Path(__file__).resolve().parents[1]
TABLES = Path(__file__).with_name("papers.yaml")
RECIPES = ROOT / "configs" / "papers"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method: what the paper prints, and what was found here."""

    name: str
    printed: float | None
    found: float


def shares_closed(worst: float, original: float, values: Sequence[float]) -> list[float]:
    """(ln worst - ln value) / (ln worst - ln original), of each."""
    gap = math.log(worst) - math.log(original)
    return [(math.log(worst) - math.log(value)) / gap if gap else math.nan for value in values]


def order_claims(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Each row that the paper has better than the one before it, and whether it is so here."""
    return [
        (f"{better.name} is better than {worse.name}", better.found < worse.found)
        for worse, better in pairwise(rows)
        if worse.printed is None or better.printed is None or better.printed < worse.printed
    ]


def render(paper: Mapping[str, Any], rows: Sequence[Row], original: float, notes: str) -> str:
    """The table, its claims, and what was run."""
    lines = [str(paper["title"]), f"paper: {paper['table']}", f"here:  {notes}", ""]
    printed = [row.printed for row in rows if row.printed is not None]
    theirs: list[str] = ["-"] * len(rows)
    if paper["original"] is not None and len(printed) > 1:
        known = iter(shares_closed(max(printed), paper["original"], printed))
        theirs = ["-" if row.printed is None else f"{next(known):.0%}" for row in rows]
    found = [row.found for row in rows]
    ours = [f"{share:.0%}" for share in shares_closed(max(found), original, found)]
    lines.append(f"{'':14}{'paper':>10}{'closed':>9}{'here':>12}{'closed':>9}")
    shown = "-" if paper["original"] is None else f"{paper['original']:g}"
    lines.append(f"{'original':14}{shown:>10}{'100%':>9}{original:>12.2f}{'100%':>9}")
    for row, their, our in zip(rows, theirs, ours, strict=True):
        shown = "-" if row.printed is None else f"{row.printed:g}"
        lines.append(f"{row.name:14}{shown:>10}{their:>9}{row.found:>12.2f}{our:>9}")
    compared = [row for row in rows if row.printed is not None or not printed]
    lines += ["", *(f"{'yes' if holds else 'NO '}  {c}" for c, holds in order_claims(compared))]
    return "\n".join(lines)


def run_paper(name: str, paper: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Quantize and score every row."""
    scored: dict[str, float] = {}
    original = math.nan
    for row, asked in paper["rows"].items():
        if "peer" in asked and row not in options.peers:
            continue
        output = options.work / name / row.lower()
        if "peer" in asked:
            run_peer(asked, options.peers[row], output, options)
        else:
            run_row(asked, output, options)
        found = score(output, options)
        scored[row], original = found["ppl"], found["reference_ppl"]
        print(f"{row}: perplexity {found['ppl']:.2f}, KL {found['kl']:.4f}", file=sys.stderr)
    rows = [
        Row(name=row, printed=paper["rows"][row].get("printed"), found=ppl)
        for row, ppl in scored.items()
    ]
    smaller = [
        f"{label} {value}"
        for label, value in (
            ("windows of calibration:", options.num_samples),
            ("tokens of each:", options.calibration_seq_len),
        )
        if value is not None
    ]
    size = f"; not the paper's size: {', '.join(smaller)}" if smaller else ""
    where = f"{options.model} on {options.text}, {options.windows} windows of {options.seq_len}"
    return render(paper, rows, original, where + size)


def run_row(asked: Mapping[str, Any], output: Path, options: argparse.Namespace) -> None:
    """One job of rotq's."""
    from rotq.quantize.pipeline import quantize_model
    from rotq.recipe import load_recipe

    given = {"calibration.source": options.calibration, **asked.get("set", {})}
    if options.num_samples is not None:
        given["calibration.num_samples"] = options.num_samples
    if options.calibration_seq_len is not None:
        given["calibration.seq_len"] = options.calibration_seq_len
    recipe = load_recipe(ROOT / "configs" / f"{asked['recipe']}.yaml", given)
    quantize_model(options.model, recipe, output, resume="auto", overwrite=False)


def run_peer(
    asked: Mapping[str, Any], python: str, output: Path, options: argparse.Namespace
) -> None:
    """A peer's own tool in its own environment, on the windows that rotq's rows saw."""
    import torch

    from rotq.calibration.data import load_windows
    from rotq.checkpoint.limits import read_limits
    from rotq.checkpoint.load import load_tokenizer
    from rotq.checkpoint.location import locate
    from rotq.recipe import Calibration

    if (output / "run.json").is_file():
        return
    drawn = load_windows(
        Calibration(
            source=options.calibration,
            num_samples=options.num_samples or 128,
            seq_len=options.calibration_seq_len or 2048,
        ),
        load_tokenizer(options.model),
        read_limits(locate(options.model), trust_remote_code=False),
        write=no_own_text,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    ids = output.with_suffix(".pt")
    torch.save(drawn.ids_BT, ids)
    script = ROOT / "scripts" / "peers" / asked["peer"]
    command = [python, script, "--model", options.model, "--calibration-ids", ids]
    subprocess.run([*command, "--out", output, *asked["arguments"]], check=True)


def no_own_text(*_: Any) -> Any:
    """Peers read the text that is given."""
    raise RotqError("--calibration self: a peer needs a text")


def score(output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and KL, kept beside the checkpoint."""
    from rotq.cli.eval import measure
    from rotq.evaluation.perplexity import Protocol

    asked = [str(options.text), options.windows, options.seq_len]
    kept = output.with_suffix(".json")
    if kept.is_file() and (held := json.loads(kept.read_text()))["asked"] == asked:
        return dict(held["found"])
    found = measure(
        output,
        options.text,
        Protocol(windows=options.windows, seq_len=options.seq_len),
        reference=options.model,
        device_map=None,
        dtype="auto",
        trust_remote_code=False,
    ).to_dict()
    kept.write_text(json.dumps({"asked": asked, "found": found}))
    return found


def run_turboesm(options: argparse.Namespace) -> None:
    """``rotq eval decode``, which has the paper's cosines beside ours."""
    spec = KVSpec.from_dict(yaml.safe_load((RECIPES / "turboesm.yaml").read_text()))
    assert spec == PRESETS["turboesm"]
    command = [sys.executable, "-m", "rotq", "eval", "decode", options.model]
    command += ["--kv", "turboesm,k3v3,int8,dense", "--calibration", options.calibration]
    subprocess.run(command, check=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paper", choices=[*yaml.safe_load(TABLES.read_text()), "turboesm"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default="pydoc", help="FASTA for turboesm")
    parser.add_argument("--text", default="pydoc-test")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--num-samples", type=int, help="instead of the paper's")
    parser.add_argument("--calibration-seq-len", type=int, help="instead of the paper's")
    parser.add_argument("--work", type=Path, default=Path("out/papers"))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    options = parser.parse_args(arguments)
    options.peers = dict(peer.split("=", 1) for peer in options.peer)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        if options.paper == "turboesm":
            run_turboesm(options)
        else:
            paper = yaml.safe_load(TABLES.read_text(encoding="utf-8"))[options.paper]
            print(run_paper(options.paper, paper, options))
    except RotqError as error:
        sys.exit(f"reproduce.py: {error}")


if __name__ == "__main__":
    main()
