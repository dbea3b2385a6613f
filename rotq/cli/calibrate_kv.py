"""``rotq calibrate-kv``: the constants of a packed KV cache."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.loading import choose, find, load, say, show
from rotq.cli.options import (
    Command,
    FilePath,
    ModelName,
    Seed,
    Words,
    bos_option,
    device_option,
    model_options,
    output_options,
)
from rotq.errors import RotqError
from rotq.recipe import Calibration
from rotq.recipe.calibration import BOS

if TYPE_CHECKING:
    from rotq.calibration.data import Windows
    from rotq.kv.calibration.file import KVCalibration
    from rotq.kv.presets import KVSpec


def calibration_options(command: Command) -> Command:
    """``--calibration``, ``--num-samples``, ``--calibration-seq-len`` and ``--seed``, checked."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            Calibration(
                source=options["calibration"],
                num_samples=options["num_samples"],
                seq_len=options["calibration_seq_len"],
                seed=options["seed"],
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        command(*args, **options)

    wrapped: Command = run
    for option in (
        bos_option("auto"),
        click.option("--seed", type=Seed(), default=0, show_default=True, help="Of the draw."),
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
            type=Words(),
            metavar="FILE|ID|pydoc|self",
            default="pydoc",
            show_default=True,
            help="Calibration text, as rotq quantize takes it; self is written by the model.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


@click.command("calibrate-kv")
@click.argument("model", type=ModelName())
@click.option(
    "-o",
    "--output",
    type=FilePath(),
    required=True,
    help="File to write; one that exists is replaced if this command wrote it.",
)
@click.option(
    "--kv", "name", default="k3v3", show_default=True, metavar="PRESET", help="Scheme to fit."
)
@calibration_options
@device_option
@model_options
@output_options
def calibrate_kv(
    model: str,
    output: Path,
    name: str,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    **options: Any,
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
    choose(device)
    place = find(model)
    path = _writable(output, place.path, options["calibration"])
    loaded = load(place, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    found = calibrate_all(*loaded, [spec], **options)[0]
    found.save(path)
    facts = {"output": str(output), "bytes": path.stat().st_size, "preset": spec.name}
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
    bos: BOS,
) -> list[KVCalibration]:
    """Fit schemes to one draw of calibration windows.

    Raises:
        RotqError: the text or the model is not as it must be.
    """
    from rotq.calibration.data import load_windows
    from rotq.calibration.sampled import writer
    from rotq.kv.calibration.calibrate import calibrate
    from rotq.kv.calibration.statistics import collect
    from rotq.models.limits import limits_of

    drawn: Windows = load_windows(
        Calibration(
            source=calibration,
            num_samples=num_samples,
            seq_len=calibration_seq_len,
            seed=seed,
            bos=bos,
        ),
        tokenizer,
        limits_of(model),
        write=writer(model, on_batch=show("calibration window written")),
    )
    say(drawn.notes)
    source = {"text": drawn.source, "sha256": drawn.sha256, "seed": seed}
    sinks, length = max(spec.sinks for spec in specs), drawn.first_BT.shape[1]
    if sinks >= length:
        raise RotqError(f"windows of {length} tokens hold nothing behind {sinks} sinks")
    statistics = collect(
        model, drawn.ids_BT, sinks=sinks, seed=seed, on_window=show("calibration window")
    )
    notes: list[str] = []
    found = [
        calibrate(
            model,
            drawn.ids_BT,
            spec,
            source=source,
            statistics=statistics,
            on_note=notes.append,
        )
        for spec in specs
    ]
    say(f"warning: {note}" for note in dict.fromkeys(notes))
    return found


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


def _writable(output: Path, model: Path, calibration: str) -> Path:
    """Fail before the work, not after it."""
    from rotq.disk.destination import file_to_write, named_file
    from rotq.kv.calibration.file import foreign

    text = named_file(calibration)
    inputs = {"the model": model} | ({} if text is None else {"the calibration text": text})
    return file_to_write(output, inputs, foreign)
