"""``--kv`` of commands that score a model with a packed cache, and where constants come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.calibrate_kv import NONE, calibrator, named_specs
from rotq.cli.kv_schemes import constants_in, find_constants
from rotq.cli.options import Command, FilePath

if TYPE_CHECKING:
    from rotq.evaluation.quantized_history import KVScheme, QuantizedHistory
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
    scheme: KVScheme | None = None
    history: QuantizedHistory | None = None

    def attention(self, model: Any, tokenizer: Any) -> QuantizedHistory:
        """The attention that a model is scored with; calibrated now where no file was given.

        Raises:
            RotqError: the file or the model is not as it must be, or does not serve the scheme.
        """
        from rotq.evaluation.quantized_history import QuantizedHistory, scheme_of

        self.calibration = self._constants(model, tokenizer)
        self.scheme = scheme_of(self.calibration)
        self.history = QuantizedHistory(self.scheme)
        return self.history

    def _constants(self, model: Any, tokenizer: Any) -> KVCalibration:
        if self.file is not None and str(self.file) != NONE and self.spec.needs_calibration:
            return constants_in(self.file, model, self.spec)
        fitting = calibrator(model, tokenizer)
        [found] = find_constants(model, [self.spec], self.file, fitting)
        return found

    def facts(self) -> dict[str, Any]:
        """The scheme, what a token takes, and the errors of each layer's attention, for JSON.

        There are none where all that was run has generated: that reads the cache itself.
        """
        scheme = self.scheme
        assert scheme is not None
        assert self.history is not None
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
