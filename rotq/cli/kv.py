"""``rotq calibrate-kv`` and ``rotq eval kv``: constants of a packed KV cache, and what it costs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.eval import eval_group
from rotq.cli.options import Command, model_options, output_options
from rotq.errors import RotqError

if TYPE_CHECKING:
    from rotq.calibration.data import Windows
    from rotq.evaluation.kv import KVEvaluation
    from rotq.kv.calibration_file import KVCalibration
    from rotq.kv.presets import KVSpec


def _calibration_options(command: Command) -> Command:
    for option in (
        click.option("--seed", type=int, default=0, show_default=True, help="Of the draw."),
        click.option(
            "--calibration-seq-len",
            type=click.IntRange(min=64),
            default=1024,
            show_default=True,
            help="Tokens per calibration window.",
        ),
        click.option(
            "--num-samples",
            type=click.IntRange(min=1),
            default=16,
            show_default=True,
            help="Calibration windows.",
        ),
        click.option(
            "--calibration",
            metavar="FILE|ID|pydoc",
            default="pydoc",
            show_default=True,
            help="Calibration text, as rotq quantize takes it.",
        ),
    ):
        command = option(command)
    return command


@click.command("calibrate-kv")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write."
)
@click.option(
    "--kv", "name", default="k3v3", show_default=True, metavar="PRESET", help="Scheme to fit."
)
@_calibration_options
@model_options
@output_options
def calibrate_kv(
    model: Path, output: Path, name: str, dtype: str, trust_remote_code: bool, **options: Any
) -> None:
    """Fit the constants of a packed KV cache to MODEL, and write them as one safetensors file.

    A file serves all of k2v2 to k8v8: their constants do not depend on the bits.

    \b
    rotq calibrate-kv models/llama -o llama-kv.safetensors
    rotq calibrate-kv models/llama -o llama-kv.safetensors --calibration wiki.txt
    """
    as_json = options.pop("as_json")
    spec = _specs(name)[0]
    _check_writable(output)
    loaded = _load(model, dtype=dtype, trust_remote_code=trust_remote_code)
    found = _calibrate(*loaded, [spec], **options)[0]
    found.save(output)
    facts = {"output": str(output), "bytes": output.stat().st_size, "preset": spec.name}
    facts |= {"model_hash": found.model_hash, **found.source}
    if as_json:
        click.echo(json.dumps(facts))
        return
    from rotq.report.kv_tables import calibration_table

    click.echo(calibration_table(facts), nl=False)


@eval_group.command("kv")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--kv", "names", required=True, metavar="PRESET[,PRESET...]", help="Schemes to measure."
)
@click.option(
    "--kv-calibration",
    type=click.Path(path_type=Path),
    help="File of rotq calibrate-kv; without it, schemes are calibrated for this run.",
)
@click.option("--text", required=True, metavar="FILE|ID", help="As in rotq eval ppl.")
@click.option(
    "--windows",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Windows from the start of the text; 0 takes all.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="Tokens per window.",
)
@click.option("--sinks", type=click.IntRange(min=0), help="First tokens kept whole.")
@click.option("--recent", type=click.IntRange(min=0), help="Last tokens kept whole.")
@_calibration_options
@model_options
@output_options
def eval_kv(
    model: Path,
    names: str,
    kv_calibration: Path | None,
    text: str,
    windows: int,
    seq_len: int,
    as_json: bool,
    dtype: str,
    trust_remote_code: bool,
    sinks: int | None,
    recent: int | None,
    **options: Any,
) -> None:
    """What a packed KV cache costs MODEL on a text: one line of figures for each scheme.

    Every earlier token is quantized, as in decoding token by token. --json prints one object for
    each scheme, a line each.

    \b
    rotq eval kv models/llama --kv k3v3 --kv-calibration llama-kv.safetensors --text test.txt
    rotq eval kv models/llama --kv k3v3,k4v3,turboquant --text test.txt --windows 4
    """
    from rotq.calibration.data import read_text, tokenize
    from rotq.evaluation.kv import evaluate_kv
    from rotq.evaluation.perplexity import Protocol
    from rotq.evaluation.quantized_history import scheme_of

    specs = [_with_window(spec, sinks, recent) for spec in _specs(names)]
    content = read_text(text, split="test")
    loaded, tokenizer = _load(model, dtype=dtype, trust_remote_code=trust_remote_code)
    ids_N = tokenize(content, tokenizer)
    protocol = Protocol(windows=windows, seq_len=seq_len)
    protocol.cut(ids_N)  # a text that is too short fails before calibration
    calibrations = _find_calibrations(loaded, tokenizer, specs, kv_calibration, **options)
    found = evaluate_kv(
        loaded,
        ids_N,
        [scheme_of(calibration) for calibration in calibrations],
        protocol=protocol,
        on_window=_show("window"),
    )
    _print(found, as_json)


def _find_calibrations(
    model: Any, tokenizer: Any, specs: list[KVSpec], file: Path | None, **options: Any
) -> list[KVCalibration]:
    """From the file where it serves a scheme, else calibrated now, and said so."""
    from rotq.kv.calibrate import data_oblivious
    from rotq.kv.calibration_file import load_calibration

    found: dict[str, KVCalibration] = {}
    held = load_calibration(file, model.config) if file is not None else None
    for spec in specs:
        if not spec.needs_calibration:
            found[spec.name] = data_oblivious(model.config, spec)
        elif held is not None and held.serves(spec):
            found[spec.name] = held.under(spec)
    missing = [spec for spec in specs if spec.name not in found]
    if missing:
        names = ", ".join(spec.name for spec in missing)
        reason = f"not served by {file}, " if file is not None else ""
        click.echo(f"{names}: {reason}calibrated on {options['calibration']}", err=True)
        for calibration in _calibrate(model, tokenizer, missing, **options):
            found[calibration.spec.name] = calibration
    return [found[spec.name] for spec in specs]


def _calibrate(
    model: Any,
    tokenizer: Any,
    specs: list[KVSpec],
    *,
    calibration: str,
    num_samples: int,
    calibration_seq_len: int,
    seed: int,
) -> list[KVCalibration]:
    from rotq.calibration.data import load_windows
    from rotq.kv.calibrate import calibrate
    from rotq.kv.statistics import collect
    from rotq.recipe import Calibration

    drawn: Windows = load_windows(
        Calibration(
            source=calibration, num_samples=num_samples, seq_len=calibration_seq_len, seed=seed
        ),
        tokenizer,
    )
    source = {"text": drawn.source, "sha256": drawn.sha256, "seed": seed}
    sinks = max(spec.sinks for spec in specs)
    statistics = collect(
        model, drawn.ids_BT, sinks=sinks, seed=seed, on_window=_show("calibration window")
    )
    return [
        calibrate(model, drawn.ids_BT, spec, source=source, statistics=statistics) for spec in specs
    ]


def _load(path: Path, *, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from rotq.checkpoint.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    return load_model(path, dtype=dtype, trust_remote_code=trust_remote_code), tokenizer


def _specs(names: str) -> list[KVSpec]:
    from rotq.kv.presets import preset

    try:
        found = [preset(name.strip()) for name in names.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--kv: {error}") from None
    if len({spec.name for spec in found}) < len(found):
        raise click.UsageError(f"--kv {names}: a preset is named twice")
    return found


def _with_window(spec: KVSpec, sinks: int | None, recent: int | None) -> KVSpec:
    from dataclasses import replace

    try:
        return replace(
            spec,
            sinks=spec.sinks if sinks is None else sinks,
            recent=spec.recent if recent is None else recent,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _check_writable(path: Path) -> None:
    """Fail before the work, not after it."""
    folder = path.absolute().parent
    if path.is_dir():
        raise RotqError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise RotqError(f"cannot write {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise RotqError(f"cannot write {path}: no permission for {folder}")


def _print(found: list[KVEvaluation], as_json: bool) -> None:
    if as_json:
        for evaluation in found:
            click.echo(json.dumps(evaluation.to_dict()))
        return
    from rotq.report.kv_tables import evaluation_table

    click.echo(evaluation_table([evaluation.to_dict() for evaluation in found]), nl=False)


def _show(label: str) -> Any:
    if not sys.stderr.isatty():
        return None
    return lambda done, total: click.echo(f"\r{label} {done}/{total}", nl=done == total, err=True)
