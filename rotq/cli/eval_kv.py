"""``rotq eval kv``: what a packed KV cache costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.calibrate_kv import calibration_options, named_specs
from rotq.cli.eval import checked_protocol
from rotq.cli.kv_scheme import find_calibrations
from rotq.cli.loading import find, load, placed_on, show
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

if TYPE_CHECKING:
    from rotq.evaluation.kv import KVEvaluation
    from rotq.kv.presets import KVSpec


@click.command("kv")
@click.argument("model", type=ModelName())
@click.option(
    "--kv", "names", required=True, metavar="PRESET[,PRESET...]", help="Schemes to measure."
)
@click.option(
    "--kv-calibration",
    type=FilePath(),
    help="File of rotq calibrate-kv; without it, schemes are calibrated for this run.",
)
@click.option("--text", type=Words(), required=True, metavar="FILE|ID", help="As in rotq eval ppl.")
@window_options
@click.option("--sinks", type=click.IntRange(min=0), help="First tokens kept whole.")
@click.option("--recent", type=click.IntRange(min=0), help="Last tokens kept whole.")
@calibration_options
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
    from rotq.evaluation.perplexity import Protocol
    from rotq.evaluation.quantized_history import scheme_of
    from rotq.models.limits import limits_of

    specs = [_with_window(spec, sinks, recent) for spec in named_specs(names)]
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
    calibrations = find_calibrations(loaded, tokenizer, specs, kv_calibration, **options)
    found = evaluate_kv(
        loaded,
        ids_N,
        [scheme_of(calibration) for calibration in calibrations],
        protocol=protocol,
        on_window=show("window"),
    )
    _print(found, as_json)


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
