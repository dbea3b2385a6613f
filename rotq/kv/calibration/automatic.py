"""Calibration that nobody has to ask for: a few windows of a text, and what they gave is kept.

    calibration = calibrated(model, tokenizer, preset("k3v3"))

draws 4 windows of 512 tokens of the built-in text, fits the scheme in seconds and writes it to the
user's cache folder; the next time it is read. A file is named by all that decides it: the model
(``hash_model``), the scheme, the windows' tokens and rotq's version. A text that says little about
the model counts little, see ``evidence``.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from rotq import __version__
from rotq.calibration.data import Windows, load_windows
from rotq.calibration.sampled import writer
from rotq.calibration.texts import is_own_text
from rotq.disk.files import make_folder
from rotq.disk.user_cache import user_cache
from rotq.errors import RotqError
from rotq.kv.calibration.budget import check_average
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.calibration.file import KVCalibration, foreign, load_calibration
from rotq.kv.calibration.model_hash import hash_model
from rotq.kv.calibration.statistics import LayerStatistics, collect
from rotq.kv.presets import KVSpec
from rotq.models.limits import limits_of
from rotq.recipe import Calibration

BRIEF = Calibration(source="pydoc", num_samples=4, seq_len=512)
"""Text and windows where nobody names any."""

_SAMPLES = 4096
"""Tokens that constants are fitted to, at most; half of them all where these are fewer."""

Progress = Callable[[int, int], None]


def _no_progress(_: str) -> Progress | None:
    return None


def calibrated(
    model: Any, tokenizer: Any, spec: KVSpec, *, say: Callable[[str], object] = warnings.warn
) -> KVCalibration:
    """Constants of a scheme for a model, from the user's cache folder or from ``BRIEF``.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its.
        spec: The scheme.
        say: Called with a line for whatever is to be known of it.

    Raises:
        RotqError: the model or the text is not as it must be.
    """
    found = Calibrator(model=model, tokenizer=tokenizer, calibration=BRIEF, say=say)
    return found.kept([spec])[0]


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of the folder, or of the hub's model in the cache, that a model came from.

    Raises:
        RotqError: there is none.
    """
    name = model.name_or_path
    advice = "give PackedCache a calibration, see rotq.kv.calibration.automatic.calibrated"
    if not name:
        raise RotqError(f"the model came from no folder, so that no tokenizer is known: {advice}")
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise RotqError(f"{name}: no tokenizer to calibrate with; {advice}") from error


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """Fits schemes to a model, all to the same windows of a text."""

    model: Any
    tokenizer: Any
    calibration: Calibration = BRIEF
    say: Callable[[str], object] = warnings.warn
    """Called with a line each for what is to be known."""
    progress: Callable[[str], Progress | None] = _no_progress
    """Gives what is called with windows done and in all, by what is done."""
    _collected: dict[int, list[LayerStatistics]] = field(default_factory=dict, init=False)

    def fit(self, specs: list[KVSpec]) -> list[KVCalibration]:
        """Constants of each scheme.

        Raises:
            RotqError: the text or the model is not as it must be.
        """
        for spec in specs:
            check_average(self.model.config, spec)
        drawn = self._written
        for note in drawn.notes:
            self.say(note)
        seed = self.calibration.seed
        source = {"text": drawn.source, "sha256": drawn.sha256, "seed": seed}
        statistics = self.statistics(max(spec.sinks for spec in specs))
        ids_BT = drawn.ids_BT
        found: list[KVCalibration] = []
        for spec in specs:
            # averages differ in what they make of the same losses
            held = next((each for each in found if each.spec.average_bits), None)
            if held is not None and spec.average_bits is not None and held.serves(spec):
                found.append(held.under(spec))
                continue
            fitted = calibrate(
                self.model, ids_BT, spec, source=source, statistics=statistics, on_note=lambda _: 0
            )
            found.append(fitted)
        return found

    def statistics(self, sinks: int) -> list[LayerStatistics]:
        """Of every layer, the first tokens of each window left out; computed once.

        Raises:
            RotqError: the text or the model is not as it must be.
        """
        if sinks in self._collected:
            return self._collected[sinks]
        ids_BT = self._written.ids_BT
        if sinks >= ids_BT.shape[1]:
            raise RotqError(
                f"windows of {ids_BT.shape[1]} tokens hold nothing behind {sinks} sinks"
            )
        on_window, seed = self.progress("calibration window"), self.calibration.seed
        found = collect(
            self.model,
            ids_BT,
            sinks=sinks,
            num_samples=min(_SAMPLES, ids_BT.numel() // 2),
            seed=seed,
            on_window=on_window,
        )
        self._collected[sinks] = found
        return found

    def kept(self, specs: list[KVSpec], folder: Path | None = None) -> list[KVCalibration]:
        """Constants of each scheme: those that are kept, and the others fitted now, and kept.

        Args:
            specs: Schemes.
            folder: Where files are kept; of the user's cache if it is left out.

        Raises:
            RotqError: as for ``fit``; a folder that cannot be used is said, no more.
        """
        folder = user_cache() / "kv" if folder is None else folder
        names = self._names(specs)
        found = [self._read(folder, name) for name in names]
        missing = [spec for spec, held in zip(specs, found, strict=True) if held is None]
        fitted = iter(self.fit(missing) if missing else ())
        for index, name in enumerate(names):
            if found[index] is None:
                found[index] = next(fitted)
                self._keep(found[index], folder, name)
        whole = [held for held in found if held is not None]
        for note in dict.fromkeys(note for held in whole for note in held.source["notes"]):
            self.say(f"warning: {note}")
        return whole

    @cached_property
    def _drawn(self) -> Windows:
        """Windows of the text; zeros stand for those that the model is to write itself."""
        return load_windows(self.calibration, self.tokenizer, limits_of(self.model))

    @cached_property
    def _written(self) -> Windows:
        """The same, and the model's own text where it is asked for."""
        if not is_own_text(self.calibration.source):
            return self._drawn
        write = writer(self.model, on_batch=self.progress("calibration window written"))
        limits = limits_of(self.model)
        return load_windows(self.calibration, self.tokenizer, limits, write=write)

    def _names(self, specs: list[KVSpec]) -> list[str | None]:
        """File names; None where a model cannot be told from others."""
        model = hash_model(self.model)
        if model is None:
            self.say("a model that is not all in memory: its KV calibration is not kept")
            return [None] * len(specs)
        drawn = self._drawn
        tokens = hashlib.sha256(drawn.ids_BT.numpy().tobytes()).hexdigest()
        facts = [__version__, model, drawn.source, drawn.sha256, tokens, self.calibration.seed]
        texts = [json.dumps([*facts, spec.to_dict()], sort_keys=True) for spec in specs]
        digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        return [f"{digest[:32]}.safetensors" for digest in digests]

    def _read(self, folder: Path, name: str | None) -> KVCalibration | None:
        path = None if name is None else folder / name
        if path is None or not path.exists():
            return None
        try:
            return load_calibration(path, self.model.config)
        except RotqError as error:
            self.say(f"{error}; calibrated again")
            return None

    def _keep(self, found: KVCalibration | None, folder: Path, name: str | None) -> None:
        assert found is not None
        windows, length = found.source["windows"]
        text = found.source["text"]
        what = f"{found.spec.name}: calibrated on {text}, {windows} windows of {length} tokens"
        if name is None:
            self.say(what)
            return
        path = folder / name
        try:
            make_folder(folder)
            if path.exists() and foreign(path):
                raise RotqError(f"{path} {foreign(path)}")
            found.save(path)
        except RotqError as error:
            self.say(f"{what}, and not kept: {error}")
            return
        self.say(f"{what}; kept as {path}")
