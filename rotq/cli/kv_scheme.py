"""``--kv`` of commands that score a model with a packed cache, and where constants come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.calibrate_kv import calibrate_all, named_specs
from rotq.cli.options import Command, FilePath
from rotq.errors import RotqError
from rotq.recipe import Calibration

if TYPE_CHECKING:
    from rotq.evaluation.quantized_history import QuantizedHistory
    from rotq.kv.calibration.file import KVCalibration
    from rotq.kv.presets import KVSpec


def kv_options(command: Command) -> Command:
    """``--kv`` as ``kv``, one preset or none, and ``--kv-calibration``."""
    for option in (
        click.option(
            "--kv-calibration",
            type=FilePath(),
            help="File of rotq calibrate-kv; without it, calibrated for this run on pydoc.",
        ),
        click.option("--kv", metavar="PRESET", help="Score with keys and values packed so."),
    ):
        command = option(command)
    return command


@dataclass
class PackedKV:
    """What ``--kv`` and ``--kv-calibration`` ask for, and what scoring with it has found."""

    spec: KVSpec
    file: Path | None
    calibration: KVCalibration | None = None
    history: QuantizedHistory | None = None

    def attention(self, model: Any, tokenizer: Any) -> QuantizedHistory:
        """The attention that a model is scored with; calibrated now where no file was given.

        Raises:
            RotqError: the file does not serve the scheme, or see ``calibrate_all``.
        """
        from rotq.evaluation.quantized_history import QuantizedHistory, scheme_of

        self.calibration = self._fitted(model, tokenizer)
        self.history = QuantizedHistory(scheme_of(self.calibration))
        return self.history

    def _fitted(self, model: Any, tokenizer: Any) -> KVCalibration:
        from rotq.kv.calibration.file import load_calibration

        if self.file is not None and self.spec.needs_calibration:
            held = load_calibration(self.file, model.config)
            if not held.serves(self.spec):
                other = f"is for {held.spec.name} and does not serve {self.spec.name}"
                raise RotqError(f"{self.file} {other}")
            return held.under(self.spec)
        known = Calibration(num_samples=16)
        [found] = find_calibrations(
            model,
            tokenizer,
            [self.spec],
            None,
            calibration=known.source,
            num_samples=known.num_samples,
            calibration_seq_len=known.seq_len,
            seed=known.seed,
            bos=known.bos,
        )
        return found

    def facts(self) -> dict[str, Any]:
        """The scheme, what a token takes, and the errors of each layer's attention, for JSON.

        There are none where all that was run has generated: that reads the cache itself.
        """
        from rotq.evaluation.quantized_history import scheme_of

        assert self.calibration is not None
        assert self.history is not None
        scheme = scheme_of(self.calibration)
        was_read = any(self.history.calls.values())
        return {
            "preset": self.spec.name,
            "bits_per_packed_element": scheme.stored_bits,
            "bytes_per_packed_token": scheme.stored_bits * scheme.elements / 8,
            "sinks": scheme.sinks,
            "recent": scheme.recent,
            "attention_error": self.history.attention_error if was_read else [],
        }


def named_scheme(kv: str | None, file: Path | None) -> PackedKV | None:
    """What ``--kv`` asks for, before anything is read.

    Raises:
        click.UsageError: no such preset, several, or a file without one.
    """
    if kv is None:
        if file is not None:
            raise click.UsageError("--kv-calibration without --kv")
        return None
    spec, *others = named_specs(kv)
    if others:
        raise click.UsageError(f"--kv {kv}: give one preset; rotq eval kv takes several")
    return PackedKV(spec, file)


def find_calibrations(
    model: Any, tokenizer: Any, specs: list[KVSpec], file: Path | None, **options: Any
) -> list[KVCalibration]:
    """From the file where it serves a scheme, else calibrated now, and said so."""
    from rotq.kv.calibration.calibrate import data_oblivious
    from rotq.kv.calibration.file import load_calibration

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
        for calibration in calibrate_all(model, tokenizer, missing, **options):
            found[calibration.spec.name] = calibration
    return [found[spec.name] for spec in specs]
