"""What users ask of the plugin: keys of vLLM's ``--additional-config`` that begin with rotq.

rotq_kv      a preset (k3v3, ...) or a file of ``rotq calibrate-kv``: pack keys and values
rotq_linear  on a CPU: "tiles" (the default) unpacks weights tile by tile in every pass, "once"
             unpacks them at load, which is faster and takes a dense model's memory
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rotq.errors import RotqError
from rotq.kv.calibration.calibrate import data_oblivious
from rotq.kv.calibration.file import KVCalibration, load_calibration
from rotq.kv.presets import PRESETS, preset

_KEYS = ("rotq_kv", "rotq_linear")
_LINEAR = ("tiles", "once")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """See the module."""

    kv: str | None = None
    linear: Literal["tiles", "once"] = "tiles"


def read_settings(additional: object) -> Settings:
    """Of vLLM's ``additional_config``; keys of others are left alone.

    Raises:
        RotqError: a key or value that rotq does not know.
    """
    if not isinstance(additional, dict):
        return Settings()
    for key in additional:
        if str(key).startswith("rotq") and key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0)
            raise RotqError(f"additional config: no {key}; did you mean {near[0]}?")
    kv, linear = additional.get("rotq_kv"), additional.get("rotq_linear", "tiles")
    if kv is not None and (not isinstance(kv, str) or not kv):
        raise RotqError(f"additional config: rotq_kv is a preset or a file, got {kv!r}")
    if linear not in _LINEAR:
        raise RotqError(f"additional config: rotq_linear is tiles or once, got {linear!r}")
    return Settings(kv=kv, linear=linear)


def load_kv(name: str, config: Any) -> KVCalibration:
    """The constants that ``rotq_kv`` asks for.

    Args:
        name: A preset, or the path of a calibration file.
        config: transformers' configuration of the model.

    Raises:
        RotqError: neither, made for another model, or nothing that blocks can hold.
    """
    if name in PRESETS:
        try:
            found = data_oblivious(config, preset(name))
        except ValueError as error:
            raise RotqError(f"rotq_kv: {error}; run rotq calibrate-kv and give its file") from None
    elif name.endswith(".safetensors") or Path(name).exists():
        found = load_calibration(Path(name), config)
    else:
        try:
            preset(name)
        except ValueError as error:
            raise RotqError(f"rotq_kv: {error}, or a file of rotq calibrate-kv") from None
    if found.recent:
        raise RotqError("rotq_kv: blocks keep no recent window; use a scheme with recent 0")
    if len({layer.format.bytes_per_token for layer in found.layers.values()}) > 1:
        raise RotqError("rotq_kv: all layers must have the same bits and width of heads")
    return found
