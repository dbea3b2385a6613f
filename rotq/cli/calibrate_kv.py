"""``rotq calibrate-kv``: the constants of a packed KV cache."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.kv_bits import kv_bits_option
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
from rotq.recipe import Calibration
from rotq.recipe.calibration import BOS

if TYPE_CHECKING:
    from rotq.kv.calibration.automatic import Calibrator
    from rotq.kv.presets import KVSpec


_OPTIONS = ("calibration", "num_samples", "calibration_seq_len", "seed", "bos")
"""Names that ``calibration_options`` gives to a command."""

NONE = "none"
"""In place of a file: constants that need no data."""


def calibration_options(*, num_samples: int, seq_len: int) -> Callable[[Command], Command]:
    """``--calibration``, ``--num-samples``, ``--calibration-seq-len`` and ``--seed``, checked.

    Args:
        num_samples: Windows if the option is left out.
        seq_len: Tokens of each, as well.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*args: Any, **options: Any) -> None:
            try:
                _calibration(**{name: options[name] for name in _OPTIONS})
            except ValueError as error:
                raise click.UsageError(str(error)) from None
            command(*args, **options)

        wrapped: Command = run
        for option in _calibration_options(num_samples, seq_len):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def _calibration_options(
    num_samples: int, seq_len: int
) -> tuple[Callable[[Command], Command], ...]:
    return (
        bos_option("auto"),
        click.option("--seed", type=Seed(), default=0, show_default=True, help="Of the draw."),
        click.option(
            "--calibration-seq-len",
            type=click.IntRange(min=64),
            default=seq_len,
            show_default=True,
            help="Tokens per calibration window; no more than the model has positions. As long as "
            "the contexts that will be served is best.",
        ),
        click.option(
            "--num-samples",
            type=click.IntRange(min=1),
            default=num_samples,
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
    )


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
@kv_bits_option("name")
@calibration_options(num_samples=16, seq_len=1024)
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

    A file serves all of k2v2 to k8v8: their constants do not depend on the bits. One of --kv-bits
    serves those, and every other --kv-bits.

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
    found = calibrator(*loaded, **options).fit([spec])[0]
    say(f"warning: {note}" for note in found.source["notes"])
    found.save(path)
    facts = {"output": str(output), "bytes": path.stat().st_size, "preset": spec.name}
    facts |= {"model_hash": found.model_hash, **found.source}
    if as_json:
        click.echo(json.dumps(facts))
        return
    from rotq.report.kv_tables import calibration_table

    click.echo(calibration_table(facts), nl=False)


def calibrator(model: Any, tokenizer: Any, **options: Any) -> Calibrator:
    """What fits schemes to a model: on the text that ``calibration_options`` name, or the brief."""
    from rotq.kv.calibration.automatic import BRIEF, Calibrator

    return Calibrator(
        model=model,
        tokenizer=tokenizer,
        calibration=_calibration(**options) if options else BRIEF,
        say=lambda line: say([line]),
        progress=show,
    )


def _calibration(
    *, calibration: str, num_samples: int, calibration_seq_len: int, seed: int, bos: BOS
) -> Calibration:
    """Raise ValueError unless the options can be."""
    return Calibration(
        source=calibration,
        num_samples=num_samples,
        seq_len=calibration_seq_len,
        seed=seed,
        bos=bos,
    )


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
