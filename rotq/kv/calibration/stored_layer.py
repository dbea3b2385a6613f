"""What a calibration file holds of one layer, and the way back, which believes nothing.

Its tensors are ``<layer>.<side>.<name>``, or ``<layer>.<name>`` for those of no side. What is equal
for all heads is stored once; inverses are not stored but taken again.

The scheme and the model decide what a layer's facts must be and which tensors it must have, in
which shapes; so the facts are compared with what they should be, and are not used.

Shape suffixes: H KV heads, D head width, L levels, E thresholds, R rotary pairs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rotq.kv.calibration.boost import with_boost
from rotq.kv.calibration.budget import CHOICES
from rotq.kv.calibration.layer_constants import (
    BOOSTED_BITS,
    kv_format,
    search_steps,
    stored_inverse,
)
from rotq.kv.calibration.soundness import check_constants
from rotq.kv.calibration.stored_file import StoredFile
from rotq.kv.presets import KVSpec
from rotq.models.rotary import KVShape, Rotary
from rotq.ops import TABLE_BITS, KVConstants, KVFormat, SideConstants
from rotq.recipe.sections import shown

_SIDE = ("matrix_HDD", "mean_HD", "levels_HL", "thresholds_HL", "base_H", "unit_H")
_SIDES = ("key", "value")
_LAYER = ("inv_freq_R", "sketch_DD", "residual_scale_H", "gamma_base_H")


def layer_facts(constants: KVConstants) -> dict[str, Any]:
    """What is no tensor, ready for JSON."""
    return {
        "format": asdict(constants.format),
        "mean": constants.mean,
        "rotary_scale": constants.rotary_scale,
        "heads": constants.key.base_H.numel(),
        "key_gain": constants.key.gain,
        "value_gain": constants.value.gain,
        "key_search": constants.key.search,
        "value_search": constants.value.search,
    }


def layer_tensors(layer: int, constants: KVConstants) -> dict[str, Tensor]:
    """The tensors of a layer by their names in the file."""
    tensors: dict[str, Tensor] = {}
    for side, held in (("key", constants.key), ("value", constants.value)):
        for name in _SIDE:
            tensors[f"{layer}.{side}.{name}"] = _stored_once(getattr(held, name))
        for name in ("metric_HDD", "boost_HC"):
            if getattr(held, name) is not None:
                tensors[f"{layer}.{side}.{name}"] = _stored_once(getattr(held, name))
    for name in _LAYER:
        value = getattr(constants, name)
        if value is not None:
            tensors[f"{layer}.{name}"] = value.clone()
    return tensors


def _stored_once(tensor: Tensor) -> Tensor:
    equal = bool((tensor == tensor[:1]).all())
    return (tensor[:1] if equal else tensor).clone().contiguous()


@dataclass(frozen=True, kw_only=True)
class LayerReader:
    """Undoes ``layer_facts`` and ``layer_tensors`` for one layer of a model."""

    file: StoredFile
    spec: KVSpec
    layer: int
    num_layers: int
    shape: KVShape
    """Of the model's layer."""
    rotary: Rotary | None
    """As well."""

    def read(self, facts: object) -> KVConstants:
        """The layer's constants.

        Args:
            facts: Its own, as JSON gave them.

        Raises:
            ValueError: a fact or a tensor is not what the scheme and the model ask for; names it.
        """
        facts = self._checked(facts)
        bits = {name: facts[f"format.{name}"] for name in ("k_bits", "v_bits")}
        format = replace(self._format, **bits)
        H, D = self.shape.num_heads, self.shape.head_dim
        qjl = format.residual == "qjl"
        found = KVConstants(
            format=format,
            key=self._side("key", format.k_bits, facts["key_search"]),
            value=self._side("value", format.v_bits, facts["value_search"]),
            mean=facts["mean"],
            inv_freq_R=self._inv_freq() if facts["mean"] == "rope" else None,
            rotary_scale=facts["rotary_scale"],
            sketch_DD=self._tensor("sketch_DD", (D, D)) if qjl else None,
            residual_scale_H=self._tensor("residual_scale_H", (H,))
            if format.residual != "none"
            else None,
            gamma_base_H=self._tensor("gamma_base_H", (H,)) if qjl else None,
        )
        try:
            check_constants(found, self.spec)
        except ValueError as error:
            raise ValueError(f"{self.layer}.{error}") from None
        return found

    @property
    def _format(self) -> KVFormat:
        return kv_format(self.spec, self.shape.head_dim, self.layer, self.num_layers)

    def _checked(self, facts: object) -> dict[str, Any]:
        """The facts by name, those of the format too."""
        said = _flat(facts)
        allowed = self._allowed(turned=said.get("mean") == "rope")
        if said.keys() != allowed.keys():
            raise ValueError(f"layer {self.layer}: its facts are not {', '.join(allowed)}")
        for name, values in allowed.items():
            found = said[name]
            if not any(type(found) is type(value) and found == value for value in values):
                expected = " or ".join(dict.fromkeys(map(shown, values)))
                raise ValueError(
                    f"layer {self.layer}: its {name} is {shown(found)}, not {expected}"
                )
        return said

    def _allowed(self, *, turned: bool) -> dict[str, tuple[object, ...]]:
        """What each fact may be."""
        form: dict[str, tuple[object, ...]]
        form = {f"format.{name}": (value,) for name, value in asdict(self._format).items()}
        if self.spec.average_bits is not None:
            form |= {"format.k_bits": CHOICES, "format.v_bits": CHOICES}
        # static where the layer's RoPE is unknown, or was when the file was made
        means = ("rope", "static") if self.spec.mean == "rope" else (self.spec.mean,)
        scale = self.rotary.scale if turned and self.rotary is not None else 1.0
        return {
            **form,
            "mean": means,
            "rotary_scale": (scale,),
            "heads": (self.shape.num_heads,),
            "key_gain": (self.spec.gain,),
            "value_gain": (self.spec.gain,),
            **{f"{side}_search": self._searches(form[f"format.{side[0]}_bits"]) for side in _SIDES},
        }

    def _searches(self, bits: tuple[Any, ...]) -> tuple[object, ...]:
        """Steps that a side of one of so many bits may have."""
        return (0, *dict.fromkeys(search_steps(self.spec.search, each) for each in bits))

    def _side(self, side: str, bits: int, search: int) -> SideConstants:
        D = self.shape.head_dim
        rests: dict[str, tuple[int, ...]] = {
            "matrix_HDD": (D, D),
            "mean_HD": (D,),
            "levels_HL": (2**bits if bits <= TABLE_BITS else 0,),
            "thresholds_HL": (2**bits - 1,),
            "base_H": (),
            "unit_H": (),
        }
        if search:
            rests["metric_HDD"] = (D, D)
        if self.spec.boosts:
            rests["boost_HC"] = (len(BOOSTED_BITS),)
        held = {name: self._heads(f"{side}.{name}", rest) for name, rest in rests.items()}
        plain = SideConstants(
            gain=self.spec.gain,
            search=search,
            inverse_HDD=stored_inverse(held["matrix_HDD"]),
            **held,
        )
        return with_boost(plain, held["boost_HC"], bits) if self.spec.boosts else plain

    def _heads(self, name: str, rest: tuple[int, ...]) -> Tensor:
        """A tensor of all heads, which may be stored once."""
        H = self.shape.num_heads
        tensor = self._tensor(name, (1, *rest), (H, *rest))
        return tensor.expand(H, *rest).contiguous()

    def _inv_freq(self) -> Tensor:
        """Frequencies, which must be those of the model."""
        if self.rotary is None:
            raise ValueError(
                f"layer {self.layer}: a mean that turns with RoPE, and the model's layer is not "
                "known to turn so"
            )
        own_R = self.rotary.inv_freq_R
        found_R = self._tensor("inv_freq_R", tuple(own_R.shape))
        if not torch.allclose(found_R, own_R.cpu(), rtol=1e-6, atol=0):
            raise ValueError(f"{self.layer}.inv_freq_R is not that of the model")
        return found_R

    def _tensor(self, name: str, *shapes: tuple[int, ...]) -> Tensor:
        dtype = torch.int8 if name.endswith("levels_HL") else torch.float32
        return self.file.tensor(f"{self.layer}.{name}", dtype, shapes)


def _flat(facts: object) -> dict[str, Any]:
    """The facts and, as ``format.<name>``, those of the format; empty where they are no objects."""
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), dict):
        return {}
    form = {f"format.{name}": value for name, value in facts["format"].items()}
    return form | {name: value for name, value in facts.items() if name != "format"}
