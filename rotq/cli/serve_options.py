"""What ``rotq serve-kv`` and ``rotq bench serve`` share: options, limits, the cache's constants."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.calibrate_kv import NONE, calibrator, named_specs
from rotq.cli.kv_schemes import constants_in, with_window
from rotq.cli.loading import say
from rotq.cli.options import Command, FilePath, device_option
from rotq.errors import RotqError

if TYPE_CHECKING:
    from rotq.kv.calibration.file import KVCalibration
    from rotq.kv.presets import KVSpec
    from rotq.serve.settings import Settings


def serving_options(command: Command) -> Command:
    """Options of the cache and the batch: memory, constants, sequences, device."""
    for option in (
        device_option,
        click.option(
            "--max-batch",
            type=click.IntRange(1, 4096),
            default=32,
            show_default=True,
            help="Sequences that run together.",
        ),
        click.option(
            "--prefill-chunk",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Tokens of a prompt in one pass, a multiple of 64; 0 takes 2048 on a GPU, 64 on a "
            "CPU. Prompts share what fills whole chunks.",
        ),
        click.option(
            "--kv-memory",
            default="1GiB",
            show_default=True,
            metavar="SIZE",
            help="Bytes of the cache, allocated at start: 512MiB, 4GB, ...",
        ),
        click.option(
            "--sinks",
            type=click.IntRange(min=0),
            help="First tokens of a sequence kept whole; if left out, as many as the scheme has.",
        ),
        click.option(
            "--kv-calibration",
            type=FilePath(),
            metavar="FILE|none",
            help="File of rotq calibrate-kv, or none for constants that need no data; without it, "
            "the cache is calibrated in seconds on a built-in text, and the result is kept in the "
            "user's cache folder.",
        ),
    ):
        command = option(command)
    return command


def named_caches(names: str, file: Path | None, sinks: int | None) -> list[KVSpec | None]:
    """What ``--kv`` names, before anything is read; None stands for dense.

    Args:
        names: Separated by commas.
        file: As ``--kv-calibration`` has it.
        sinks: First tokens that packed caches keep whole; None: as their schemes have it.

    Raises:
        click.UsageError: no such scheme, one named twice, or options that no cache takes.
    """
    from rotq.serve.settings import DENSE

    listed = [name.strip() for name in names.split(",")]
    if listed == [DENSE] and file is not None:
        raise click.UsageError("--kv dense has no calibration")
    if listed == [DENSE] and sinks is not None:
        raise click.UsageError("--kv dense keeps all tokens whole: it has no --sinks")
    caches = [
        None if name == DENSE else with_window(named_specs(name)[0], sinks) for name in listed
    ]
    if any(cache in caches[:place] for place, cache in enumerate(caches)):
        raise click.UsageError(f"--kv {names}: a cache is named twice")
    return caches


def find_calibration(
    model: Any, tokenizer: Any, spec: KVSpec | None, file: Path | None
) -> KVCalibration | None:
    """Constants of a scheme for a model; None for dense, which needs none.

    Args:
        model: That is to be served.
        tokenizer: Its.
        spec: Of ``named_caches``.
        file: As ``--kv-calibration`` has it.

    Raises:
        RotqError: the file does not serve the scheme, or the model has nothing to pack.
    """
    from rotq.models.attention.online import rounds_heads

    if spec is None:
        return None
    if rounds_heads(model):
        click.echo(
            f"{spec.name}: the cache packs keys and values in place of the model's own rounding of "
            "them (kv_cache.bits), which --kv dense keeps",
            err=True,
        )
    if file is None or str(file) == NONE:
        return _without_file(model, tokenizer, spec, calibrate=file is None)
    return constants_in(file, model, spec)


def _without_file(model: Any, tokenizer: Any, spec: KVSpec, *, calibrate: bool) -> KVCalibration:
    """Calibrated, now or before; without data where that is asked for, or nothing else works."""
    from rotq.kv.calibration.calibrate import data_oblivious
    from rotq.models.rotary import kv_shapes

    try:
        kv_shapes(model.config)
    except RotqError as error:
        advice = "; --kv dense serves it unpacked" if _serves_dense(model) else ""
        raise RotqError(f"{error}{advice}") from None
    reason = ""
    if calibrate and spec.needs_calibration:
        try:
            return calibrator(model, tokenizer).kept([spec])[0]
        except RotqError as error:
            reason = f"cannot be calibrated: {error}"
    try:
        found = data_oblivious(model.config, spec)
    except ValueError as error:
        raise RotqError(f"{error}; {reason or 'leave out --kv-calibration none'}") from None
    if reason:
        say([f"{spec.name}: {reason}; served with constants that need no data ({found.spec.name})"])
    return found


def _serves_dense(model: Any) -> bool:
    from rotq.kv.pool.dense import shapes_and_windows

    try:
        return bool(shapes_and_windows(model))
    except RotqError:
        return False


def checked_settings(*, kv_memory: str, **limits: Any) -> Settings:
    """Settings of a command's limits; click.UsageError where one is out of range."""
    from rotq.serve.settings import Settings, parse_size

    try:
        return Settings(kv_memory=parse_size(kv_memory), **limits)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def require_packages(*names: str) -> None:
    """Raise RotqError, with what to install, where a package is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RotqError(f"{', '.join(missing)} is not installed: pip install 'rotq[serve]'")
