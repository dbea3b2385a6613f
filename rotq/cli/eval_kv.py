"""``rotq eval kv``: what a packed KV cache costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.calibrate_kv import NONE, calibration_options, calibrator, named_specs
from rotq.cli.eval import checked_protocol
from rotq.cli.loading import find, load, placed_on, say, show
from rotq.cli.options import (
    FilePath,
    ModelName,
    Words,
    device_map_option,
    device_option,
    model_options,
    output_options,
    window_options,
)
from rotq.errors import RotqError

if TYPE_CHECKING:
    from rotq.evaluation.kv import KVEvaluation
    from rotq.kv.calibration.automatic import Calibrator
    from rotq.kv.calibration.file import KVCalibration
    from rotq.kv.presets import KVSpec


@click.command("kv")
@click.argument("model", type=ModelName())
@click.option(
    "--kv",
    "names",
    required=True,
    metavar="SCHEME[,SCHEME...]",
    help="Presets to measure, and schemes of others: kivi-2, -3, -4, kvarn-k4v2, -k3v3, -k2v2, "
    "oscar-int2, vllm-tq3, -tq4.",
)
@click.option(
    "--kv-calibration",
    type=FilePath(),
    metavar="FILE|none",
    help="File of rotq calibrate-kv, or none for constants that need no data; without it, schemes "
    "are calibrated now, and the result is kept in the user's cache folder.",
)
@click.option("--text", type=Words(), required=True, metavar="FILE|ID", help="As in rotq eval ppl.")
@window_options
@click.option("--sinks", type=click.IntRange(min=0), help="First tokens kept whole.")
@click.option("--recent", type=click.IntRange(min=0), help="Last tokens kept whole.")
@click.option(
    "--chunk",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Tokens of a forward pass, which see each other whole; 1 is decoding.",
)
@calibration_options(num_samples=4, seq_len=512)
@device_option
@device_map_option
@model_options
@output_options
def eval_kv(
    model: str,
    names: str,
    kv_calibration: Path | None,
    text: str,
    windows: int,
    seq_len: int,
    as_json: bool,
    device: str,
    placed: str | None,
    dtype: str,
    trust_remote_code: bool,
    sinks: int | None,
    recent: int | None,
    chunk: int,
    **options: Any,
) -> None:
    """What a packed KV cache costs MODEL on a text: one line of figures for each scheme.

    Every earlier token is quantized, as in decoding token by token. --json prints one object for
    each scheme, a line each.

    \b
    rotq eval kv models/llama --kv k3v3 --kv-calibration llama-kv.safetensors --text test.txt
    rotq eval kv models/llama --kv k3v3,k4v3,turboquant --text test.txt --windows 4
    """
    from rotq.calibration.texts import read_text
    from rotq.calibration.tokenized import first_tokens, tokenize
    from rotq.evaluation.kv import evaluate_kv
    from rotq.evaluation.peers import PEERS, scheme_of_peer
    from rotq.evaluation.perplexity import Protocol
    from rotq.evaluation.quantized_history import scheme_of
    from rotq.kv.presets import preset
    from rotq.models.limits import limits_of

    peers = {name: PEERS[name] for name in map(str.strip, names.split(",")) if name in PEERS}
    specs = _named(names, peers, sinks, recent)
    placed_on(device, placed)
    content = read_text(text, split="test")
    loaded, tokenizer = load(
        find(model),
        device=device,
        placed=placed,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    ids_N = tokenize(content, tokenizer)
    # what is refused or cut is so before calibration
    first = first_tokens(content, tokenizer, options["bos"])
    asked = Protocol(windows=windows, seq_len=seq_len, first=first)
    protocol = checked_protocol(asked, limits_of(loaded), content, ids_N)
    fitting = calibrator(loaded, tokenizer, **options)
    calibrations = _find_calibrations(loaded, specs, kv_calibration, fitting)
    schemes = {scheme.name: scheme for scheme in map(scheme_of, calibrations)}
    whole = _with_window(preset("k3v3"), sinks, recent)
    for name, peer in peers.items():
        statistics = fitting.statistics(whole.sinks) if peer.calibrated else []
        schemes[name] = scheme_of_peer(
            peer, loaded, statistics, sinks=whole.sinks, recent=whole.recent
        )
    found = evaluate_kv(
        loaded,
        ids_N,
        [schemes[name.strip()] for name in names.split(",")],
        protocol=protocol,
        chunk=chunk,
        on_window=show("window"),
    )
    _print(found, as_json)


def _find_calibrations(
    model: Any, specs: list[KVSpec], file: Path | None, fitting: Calibrator
) -> list[KVCalibration]:
    """From the file where it serves a scheme, else calibrated now, and said so."""
    from rotq.kv.calibration.file import load_calibration

    found: dict[str, KVCalibration] = {}
    without = str(file) == NONE
    held = None if file is None or without else load_calibration(file, model.config)
    for spec in specs:
        if without or not spec.needs_calibration:
            found[spec.name] = _oblivious(model, spec)
        elif held is not None and held.serves(spec):
            found[spec.name] = held.under(spec)
    missing = [spec for spec in specs if spec.name not in found]
    if held is not None:
        say(f"{spec.name}: not served by {file}" for spec in missing)
    if missing:
        for calibration in fitting.kept(missing):
            found[calibration.spec.name] = calibration
    return [found[spec.name] for spec in specs]


def _named(
    names: str, peers: dict[str, Any], sinks: int | None, recent: int | None
) -> list[KVSpec]:
    """Presets by name, those left out that are of others."""
    listed = [name.strip() for name in names.split(",")]
    if len(set(listed)) < len(listed):
        raise click.UsageError(f"--kv {names}: a preset is named twice")
    own = ",".join(name for name in listed if name not in peers)
    return [_with_window(spec, sinks, recent) for spec in (named_specs(own) if own else [])]


def _oblivious(model: Any, spec: KVSpec) -> KVCalibration:
    from rotq.kv.calibration.calibrate import data_oblivious

    try:
        return data_oblivious(model.config, spec)
    except ValueError as error:
        raise RotqError(f"{error}; leave out --kv-calibration none") from None


def _with_window(spec: KVSpec, sinks: int | None, recent: int | None) -> KVSpec:
    try:
        return replace(
            spec,
            sinks=spec.sinks if sinks is None else sinks,
            recent=spec.recent if recent is None else recent,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _print(found: list[KVEvaluation], as_json: bool) -> None:
    if as_json:
        for evaluation in found:
            click.echo(json.dumps(evaluation.to_dict()))
        return
    from rotq.report.kv_tables import evaluation_table

    click.echo(evaluation_table([evaluation.to_dict() for evaluation in found]), nl=False)
