"""What calibration found, in memory and as one safetensors file.

The file's metadata hold the scheme, the model's hash, the source of the statistics and each
layer's format, as one JSON object; what is stored of a layer is in ``stored_layer``. A file is
written aside and renamed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from rotq.disk.files import whole_file
from rotq.errors import RotqError
from rotq.kv.calibration.budget import bits_chosen, budgeted, check_budget, kept_losses
from rotq.kv.calibration.device_constants import DeviceConstants
from rotq.kv.calibration.layer_constants import recoded
from rotq.kv.calibration.model_hash import hash_config
from rotq.kv.calibration.stored_file import KIND, StoredFile, empty_or_ours, opened
from rotq.kv.calibration.stored_layer import LayerReader, layer_facts, layer_tensors
from rotq.kv.presets import KVSpec
from rotq.models.rotary import kv_shapes, rotaries
from rotq.ops import KVConstants
from rotq.recipe.sections import shown

VERSION = 2

_FACTS = {"version": int, "spec": dict, "model_hash": str, "source": dict, "layers": dict}
"""What a file says of itself."""


@dataclass(kw_only=True)
class KVCalibration:
    """Constants of every layer under one scheme."""

    spec: KVSpec
    layers: dict[int, KVConstants]
    """Not to be changed once caches use them."""
    model_hash: str
    """Of the configuration it was made for; see ``hash_config``."""
    source: dict[str, Any] = field(default_factory=dict)
    """Calibration text, windows, what was chosen and why; empty without statistics."""
    _on: dict[torch.device, DeviceConstants] = field(default_factory=dict, init=False, repr=False)

    @property
    def sinks(self) -> int:
        """First tokens kept whole."""
        return self.spec.sinks

    @property
    def recent(self) -> int:
        """Last tokens kept whole."""
        return self.spec.recent

    def on(self, device: torch.device) -> DeviceConstants:
        """Constants on a device, the same for all who ask."""
        if device not in self._on:
            self._on[device] = DeviceConstants(self.layers, device)
        return self._on[device]

    def serves(self, spec: KVSpec) -> bool:
        """Whether ``under(spec)`` exists: what differs is not fitted."""
        free = ["name", "k_bits", "v_bits", "sinks", "recent", "boundary", "boundary_bits"]
        if spec.average_bits is None or kept_losses(self.source, self.layers) is not None:
            free.append("average_bits")
        own = replace(self.spec, **{name: getattr(spec, name) for name in free})
        if spec.average_bits is not None:
            return own == spec
        same_bits = (self.spec.k_bits, self.spec.v_bits) == (spec.k_bits, spec.v_bits)
        coded_alike = same_bits and self.spec.boundary == spec.boundary
        fixed = self.spec.codebook == "gaussian" and self.spec.residual == "none"
        return own == spec and (coded_alike or fixed)

    def under(self, spec: KVSpec) -> KVCalibration:
        """The same constants under another scheme, with the codebooks of its bits.

        Raises:
            ValueError: the scheme needs what was not fitted.
        """
        if not self.serves(spec):
            raise ValueError(f"a calibration for {self.spec.name} does not serve {spec.name}")
        if spec.average_bits is not None:
            return self._averaged(spec, spec.average_bits)
        layers = {
            layer: recoded(constants, *spec.layer_bits(layer, len(self.layers)))
            for layer, constants in self.layers.items()
        }
        return replace(self, spec=spec, layers=layers)

    def _averaged(self, spec: KVSpec, average_bits: float) -> KVCalibration:
        """Its own bits, or those of another average by the losses that it keeps."""
        losses = kept_losses(self.source, self.layers)
        if losses is None or average_bits == self.spec.average_bits:
            return replace(self, spec=spec)
        layers = budgeted(self.layers, losses, average_bits)
        source = {**self.source, "bits": bits_chosen(layers)}
        return replace(self, spec=spec, layers=layers, source=source)

    def save(self, path: Path) -> None:
        """Write the file; it is whole or absent.

        Raises:
            RotqError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for layer, constants in self.layers.items():
            tensors |= layer_tensors(layer, constants)
        facts = {
            "version": VERSION,
            "spec": self.spec.to_dict(),
            "model_hash": self.model_hash,
            "source": self.source,
            "layers": {n: layer_facts(constants) for n, constants in self.layers.items()},
        }
        # one key: the library writes several in an order of its own
        with whole_file(path) as file:
            file.write(save(tensors, metadata={KIND: json.dumps(facts)}))


def load_calibration(path: Path, model_config: Any) -> KVCalibration:
    """Read a file that ``KVCalibration.save`` wrote.

    Args:
        path: The file.
        model_config: Of the model that it is for.

    Raises:
        RotqError: the file is missing, truncated, of another kind, version or model, or what it
            holds is not what its scheme and the model ask for; names the file, and the tensor.
    """
    with opened(path) as file:
        try:
            return _restored(path, file, model_config)
        except ValueError as error:
            raise RotqError(f"{path} is damaged: {error}") from None


def foreign(path: Path) -> str | None:
    """What makes an existing path no file of ``KVCalibration.save``, in words; None if it is one.

    Nothing is lost with an empty file either.
    """
    if not path.is_file():
        return "is a folder" if path.is_dir() else "is no plain file"
    return None if empty_or_ours(path) else "exists and is no file of rotq calibrate-kv"


def _restored(path: Path, file: StoredFile, model_config: Any) -> KVCalibration:
    """What an open file holds; what it says about itself comes before its tensors."""
    facts = file.facts
    version = facts.get("version")
    if version != VERSION:
        raise RotqError(f"{path} has version {shown(version)}, known is {VERSION}")
    if facts.keys() != _FACTS.keys():
        raise ValueError(f"its facts are not {', '.join(_FACTS)}")
    for name, kind in _FACTS.items():
        if not isinstance(facts[name], kind):
            raise ValueError(f"its {name} is {shown(facts[name])}")
    _check_model(path, facts["model_hash"], model_config)
    spec = KVSpec.from_dict(facts["spec"])
    shapes, turns = kv_shapes(model_config), rotaries(model_config)
    if facts["layers"].keys() != {str(layer) for layer in range(len(shapes))}:
        raise RotqError(f"{path} does not hold every layer of the model, and no other")
    layers = {}
    for layer, (shape, rotary) in enumerate(zip(shapes, turns, strict=True)):
        reader = LayerReader(
            file=file,
            spec=spec,
            layer=layer,
            num_layers=len(shapes),
            shape=shape,
            rotary=rotary,
        )
        layers[layer] = reader.read(facts["layers"][str(layer)])
    file.check_all_read()
    check_budget(spec, layers)
    return KVCalibration(
        spec=spec, layers=layers, model_hash=facts["model_hash"], source=facts["source"]
    )


def _check_model(path: Path, found: str, model_config: Any) -> None:
    wanted = hash_config(model_config)
    if found != wanted:
        raise RotqError(
            f"{path} was calibrated for another model (configuration {shown(found[:12])}, "
            f"this one is {wanted[:12]}); run rotq calibrate-kv on this model"
        )
