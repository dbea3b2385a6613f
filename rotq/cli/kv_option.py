"""``--kv`` of commands that score a model with a packed cache, and where constants come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.calibrate_kv import NONE, calibrator, named_specs
from rotq.cli.kv_schemes import find_constants
from rotq.cli.options import Command, FilePath
from rotq.errors import RotqError

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
            metavar="FILE|none",
            help="File of rotq calibrate-kv, or none for constants that need no data; without it, "
            "calibrated now, and the result is kept in the user's cache folder.",
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
            RotqError: the file or the model is not as it must be, or does not serve the scheme.
        """
        from rotq.evaluation.quantized_history import QuantizedHistory, scheme_of

        fitting = calibrator(model, tokenizer)
        self._check_file(model)
        [self.calibration] = find_constants(model, [self.spec], self.file, fitting)
        self.history = QuantizedHistory(scheme_of(self.calibration))
        return self.history

    def _check_file(self, model: Any) -> None:
        """Refuse a file of another scheme: who names one scheme and one file means them."""
        from rotq.kv.calibration.file import load_calibration

        if self.file is None or str(self.file) == NONE or not self.spec.needs_calibration:
            return
        held = load_calibration(self.file, model.config)
        if not held.serves(self.spec):
            name = held.spec.name
            raise RotqError(f"{self.file} is for {name} and does not serve {self.spec.name}")

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
