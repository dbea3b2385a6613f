"""The schemes that ``rotq eval kv`` measures: presets with their constants, and those of others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.calibrate_kv import NONE, named_specs
from rotq.cli.loading import say
from rotq.errors import RotqError

if TYPE_CHECKING:
    from rotq.evaluation.peers import Peer
    from rotq.evaluation.quantized_history import KVScheme
    from rotq.kv.calibration.automatic import Calibrator
    from rotq.kv.calibration.file import KVCalibration
    from rotq.kv.presets import KVSpec


@dataclass(frozen=True, kw_only=True)
class NamedSchemes:
    """What ``--kv`` names, with the windows of whole tokens that all of it gets."""

    names: list[str]
    specs: list[KVSpec]
    peers: list[Peer]
    sinks: int
    """Of peers, which keep as many as our presets do."""
    recent: int

    @classmethod
    def parse(cls, names: str, sinks: int | None, recent: int | None) -> NamedSchemes:
        """Read ``--kv``; click.UsageError where a name is none, or named twice."""
        from rotq.evaluation.peers import PEERS
        from rotq.kv.presets import preset

        listed = [name.strip() for name in names.split(",")]
        if len(set(listed)) < len(listed):
            raise click.UsageError(f"--kv {names}: a preset is named twice")
        own = ",".join(name for name in listed if name not in PEERS)
        whole = with_window(preset("k3v3"), sinks, recent)
        return cls(
            names=listed,
            specs=[with_window(s, sinks, recent) for s in (named_specs(own) if own else [])],
            peers=[PEERS[name] for name in listed if name in PEERS],
            sinks=whole.sinks,
            recent=whole.recent,
        )

    def find(self, model: Any, file: Path | None, fitting: Calibrator) -> list[KVScheme]:
        """The schemes for a model, in the order they were named.

        Args:
            model: A causal language model of transformers.
            file: As ``--kv-calibration`` has it.
            fitting: Calibrates what the file does not serve.

        Raises:
            RotqError: the file, the text or the model is not as it must be.
        """
        from rotq.evaluation.peers import scheme_of_peer
        from rotq.evaluation.quantized_history import scheme_of

        found = [scheme_of(held) for held in find_constants(model, self.specs, file, fitting)]
        whole = {"sinks": self.sinks, "recent": self.recent}
        for peer in self.peers:
            statistics = fitting.statistics(self.sinks) if peer.calibrated else []
            found.append(scheme_of_peer(peer, model, statistics, **whole))
        by_name = {scheme.name.removesuffix("-oblivious"): scheme for scheme in found}
        return [by_name[name] for name in self.names]


def find_constants(
    model: Any, specs: list[KVSpec], file: Path | None, fitting: Calibrator
) -> list[KVCalibration]:
    """Of each scheme: from the file where it serves it, else calibrated now, and said so.

    Args:
        model: A causal language model of transformers.
        file: As ``--kv-calibration`` has it; ``none`` stands for data-free constants.
        fitting: Calibrates what the file does not serve.

    Raises:
        RotqError: the file, the text or the model is not as it must be.
    """
    from rotq.kv.calibration.budget import check_average
    from rotq.kv.calibration.file import load_calibration

    for spec in specs:
        check_average(model.config, spec)
    without = str(file) == NONE
    held = None if file is None or without else load_calibration(file, model.config)
    found: dict[str, KVCalibration] = {}
    for spec in specs:
        if without or not spec.needs_calibration:
            found[spec.name] = _oblivious(model, spec)
        elif held is not None and held.serves(spec):
            found[spec.name] = held.under(spec)
    missing = [spec for spec in specs if spec.name not in found]
    if held is not None:
        free = [spec for spec in specs if not spec.needs_calibration]
        say(f"{spec.name}: needs no calibration, {file} is not used" for spec in free)
        say(f"{spec.name}: not served by {file}" for spec in missing)
    fitted = fitting.kept(missing) if missing else []
    found |= {spec.name: held for spec, held in zip(missing, fitted, strict=True)}
    return [found[spec.name] for spec in specs]


def constants_in(file: Path, model: Any, spec: KVSpec) -> KVCalibration:
    """Of one scheme, from one file: who names both means them.

    Raises:
        RotqError: the file is not as it must be, or does not serve the scheme.
    """
    from rotq.kv.calibration.budget import check_average
    from rotq.kv.calibration.file import load_calibration

    check_average(model.config, spec)
    held = load_calibration(file, model.config)
    if not held.serves(spec):
        raise RotqError(f"{file} is for {held.spec.name} and does not serve {spec.name}")
    return held.under(spec)


def _oblivious(model: Any, spec: KVSpec) -> KVCalibration:
    from rotq.kv.calibration.calibrate import data_oblivious

    try:
        return data_oblivious(model.config, spec)
    except ValueError as error:
        raise RotqError(f"{error}; leave out --kv-calibration none") from None


def with_window(spec: KVSpec, sinks: int | None, recent: int | None = None) -> KVSpec:
    """The scheme with so many whole tokens; None leaves a number as it is.

    Raises:
        click.UsageError: no scheme keeps so many.
    """
    try:
        return replace(
            spec,
            sinks=spec.sinks if sinks is None else sinks,
            recent=spec.recent if recent is None else recent,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
