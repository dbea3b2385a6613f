"""``rotq calibrate-kv``: the constants of a packed KV cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.loading import load, say, show
from rotq.cli.options import Command, model_options, output_options
from rotq.errors import RotqError

if TYPE_CHECKING:
    from rotq.calibration.data import Windows
    from rotq.kv.calibration.file import KVCalibration
    from rotq.kv.presets import KVSpec


def calibration_options(command: Command) -> Command:
    """``--calibration``, ``--num-samples``, ``--calibration-seq-len`` and ``--seed``."""
    for option in (
        click.option("--seed", type=int, default=0, show_default=True, help="Of the draw."),
        click.option(
            "--calibration-seq-len",
            type=click.IntRange(min=64),
            default=1024,
            show_default=True,
            help="Tokens per calibration window; no more than the model has positions.",
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
@calibration_options
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
    spec, *others = named_specs(name)
    if others:
        raise click.UsageError(f"--kv {name}: a calibration is fitted under one preset")
    _check_writable(output)
    loaded = load(model, dtype=dtype, trust_remote_code=trust_remote_code)
    found = calibrate_all(*loaded, [spec], **options)[0]
    found.save(output)
    facts = {"output": str(output), "bytes": output.stat().st_size, "preset": spec.name}
    facts |= {"model_hash": found.model_hash, **found.source}
    if as_json:
        click.echo(json.dumps(facts))
        return
    from rotq.report.kv_tables import calibration_table

    click.echo(calibration_table(facts), nl=False)


def calibrate_all(
    model: Any,
    tokenizer: Any,
    specs: list[KVSpec],
    *,
    calibration: str,
    num_samples: int,
    calibration_seq_len: int,
    seed: int,
) -> list[KVCalibration]:
    """Fit schemes to one draw of calibration windows.

    Raises:
        RotqError: the text or the model is not as it must be.
    """
    from rotq.calibration.data import load_windows
    from rotq.kv.calibration.calibrate import calibrate
    from rotq.kv.calibration.statistics import collect
    from rotq.models.limits import limits_of
    from rotq.recipe import Calibration

    drawn: Windows = load_windows(
        Calibration(
            source=calibration, num_samples=num_samples, seq_len=calibration_seq_len, seed=seed
        ),
        tokenizer,
        limits_of(model),
    )
    say(drawn.notes)
    source = {"text": drawn.source, "sha256": drawn.sha256, "seed": seed}
    sinks, length = max(spec.sinks for spec in specs), drawn.first_BT.shape[1]
    if sinks >= length:
        raise RotqError(f"windows of {length} tokens hold nothing behind {sinks} sinks")
    statistics = collect(
        model, drawn.ids_BT, sinks=sinks, seed=seed, on_window=show("calibration window")
    )
    return [
        calibrate(model, drawn.ids_BT, spec, source=source, statistics=statistics) for spec in specs
    ]


def named_specs(names: str) -> list[KVSpec]:
    """Presets by name, separated by commas; click.UsageError where there is none of the name."""
    from rotq.kv.presets import preset

    try:
        found = [preset(name.strip()) for name in names.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--kv: {error}") from None
    if len({spec.name for spec in found}) < len(found):
        raise click.UsageError(f"--kv {names}: a preset is named twice")
    return found


def _check_writable(path: Path) -> None:
    """Fail before the work, not after it."""
    folder = path.absolute().parent
    if path.is_dir():
        raise RotqError(f"cannot write {path}: it is a folder")
    if not folder.is_dir():
        raise RotqError(f"cannot write {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise RotqError(f"cannot write {path}: no permission for {folder}")
