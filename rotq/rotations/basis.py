"""The bases of one job: what a recipe's rotation means for a model's sizes.

    R1  residual stream, one (D, D) matrix                  fused
    R2  value heads, one (K, K) matrix per KV head          fused
    R3  queries and keys behind RoPE, Hadamard              online
    R4  input of the MLP's last linear, Hadamard            online
        or a butterfly, with angles for every layer
    S   positive factors between layers, see ``Scales``     fused

Shape suffixes: D hidden size, H KV heads, K head size, E experts, I features between up and down;
A stages, M runs, Q pairs of a run (see ``butterfly``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.fusion.layernorm import leave_ones_alone
from rotq.recipe import Rotation
from rotq.rotations.hadamard import core_order, describe, orthogonal

if TYPE_CHECKING:
    from rotq.models.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Positive factors of one layer; what is read is divided, what reads it is multiplied.

    OSTQuant (arXiv 2501.13987), section 3.3: there S_attn, S_ffn, S_ov, S_qk and S_u|d.
    """

    qkv_D: Tensor | None = None
    """What q, k and v read is divided by it, in R1's basis."""
    gate_up_D: Tensor | None = None
    """The same for what gate and up (and the router) read."""
    value_HK: Tensor | None = None
    """Values are divided by it, before R2."""
    query_key_HK: Tensor | None = None
    """Queries are divided and keys multiplied by it, before RoPE: the two features that RoPE mixes
    have one factor. (1, K), shared by all heads, where q and k have norms."""
    up_EI: Tensor | None = None
    """What down reads is divided by it, before R4; one row per expert."""

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name without its shape suffix, and factors, of those that are there."""
        for entry in fields(self):
            tensor = getattr(self, entry.name)
            if tensor is not None:
                yield entry.name.rpartition("_")[0], tensor

    @classmethod
    def of(cls, named: dict[str, Tensor]) -> Scales:
        """The inverse of ``items``."""
        full = {entry.name.rpartition("_")[0]: entry.name for entry in fields(cls)}
        return cls(**{full[name]: tensor for name, tensor in named.items()})


SCALINGS = tuple(entry.name.rpartition("_")[0] for entry in fields(Scales))
"""Names of all scalings: qkv, gate_up, value, query_key, up."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Orthogonal matrices; activations are rows and are multiplied from the right."""

    residual_DD: Tensor | None = None
    """R1, fp64; None leaves the residual stream and the norm gains alone."""
    value: tuple[Tensor, ...] | None = None
    """R2, per layer (H, K, K) fp64."""
    attention: str | None = None
    """R3: kind of the online transform; it has no signs."""
    down: str | None = None
    """R4: kind of the online transform."""
    down_seed: int = 0
    """Seed of R4's signs, the same in every layer."""
    down_angles: tuple[Tensor, ...] | None = None
    """Where R4 is a butterfly: per layer (E, A, M, Q) fp64, radians, whole steps as stored."""
    scales: tuple[Scales, ...] | None = None
    """Per layer, fp64; None changes no scale."""
    description: dict[str, str] = field(default_factory=dict)
    """Recipe key to what was built, for example residual: hadamard 36x16."""

    @property
    def is_identity(self) -> bool:
        """Nothing is changed."""
        return not self.tensors() and self.attention is None and self.down is None

    def tensors(self) -> dict[str, Tensor]:
        """Every matrix and vector by name: residual, value.L, down.L (angles), L.scales.NAME."""
        named = {} if self.residual_DD is None else {"residual": self.residual_DD}
        named |= {f"value.{layer}": matrix for layer, matrix in enumerate(self.value or ())}
        named |= {f"down.{layer}": angles for layer, angles in enumerate(self.down_angles or ())}
        for layer, scales in enumerate(self.scales or ()):
            named |= {f"{layer}.scales.{name}": factors for name, factors in scales.items()}
        return named

    def with_tensors(self, named: dict[str, Tensor]) -> Basis:
        """The same kinds of transforms with other values; ``named`` as from ``tensors``."""
        scales: dict[int, dict[str, Tensor]] = {}
        for name, factors in named.items():
            layer, _, key = name.partition(".scales.")
            if key:
                scales.setdefault(int(layer), {})[key] = factors
        return replace(
            self,
            residual_DD=named.get("residual"),
            value=_by_layer(named, "value.") or None,
            down_angles=_by_layer(named, "down.") or None,
            scales=tuple(Scales.of(scales[layer]) for layer in sorted(scales)) or None,
        )

    @property
    def down_kind(self) -> str | None:
        """What R4 is at run time."""
        return self.down if self.down_angles is None else "butterfly"

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices and factors: fp64, but for a basis in training."""
        return next((tensor.dtype for tensor in self.tensors().values()), torch.float64)

    def checksum(self) -> str:
        """sha256 over all entries rounded to 2^-40, the online kinds and R4's seed."""
        online = f"{self.down} {self.down_seed}"
        if self.attention is not None:
            online += f" {self.attention}"
        digest = hashlib.sha256(online.encode())
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update((tensor * 2.0**40).round().long().numpy().tobytes())
        return digest.hexdigest()


def _by_layer(named: dict[str, Tensor], prefix: str) -> tuple[Tensor, ...]:
    found = {int(n.removeprefix(prefix)): t for n, t in named.items() if n.startswith(prefix)}
    return tuple(found[layer] for layer in sorted(found))


def build_basis(rotation: Rotation, adapter: Adapter, config: Any) -> Basis:
    """Draw the bases that ``rotation`` asks for.

    Args:
        rotation: Kinds and seed.
        adapter: Says which rotations the family allows.
        config: transformers' configuration: sizes.

    Raises:
        RotqError: the family does not allow a rotation, or a basis of the wanted kind does not
            exist for a size of this model; names the alternative.
    """
    _check_allowed(rotation, adapter, config)
    description = {}
    residual, value, attention, down = None, None, None, None
    if rotation.residual != "none":
        residual = _draw("residual", rotation.residual, config.hidden_size, rotation.seed)
        description["residual"] = describe(rotation.residual, config.hidden_size)
        if adapter.layer_norm:
            residual = leave_ones_alone(residual)
            description["residual"] += ", all-ones direction kept"
    if rotation.value != "none":
        size = head_dim(config)
        value = tuple(
            torch.stack(
                [
                    _draw("value", rotation.value, size, derive_seed(rotation.seed, layer, head))
                    for head in range(num_value_heads(config))
                ]
            )
            for layer in range(config.num_hidden_layers)
        )
        description["value"] = describe(rotation.value, size)
    if rotation.attention != "none":
        attention = rotation.attention
        description["attention"] = _describe_online("attention", {head_dim(config)})
    if rotation.down != "none":
        down = rotation.down
        description["down"] = _describe_online("down", mlp_widths(config))
    return Basis(
        residual_DD=residual,
        value=value,
        attention=attention,
        down=down,
        down_seed=derive_seed(rotation.seed, "down"),
        description=description,
    )


def head_dim(config: Any) -> int:
    """Features per head: the configuration's own value where it has one."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def num_value_heads(config: Any) -> int:
    """KV heads; as many as query heads where the configuration does not know the difference."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def mlp_widths(config: Any) -> set[int]:
    """Features that the last linear of an MLP reads; GPT-2 may leave its own open."""
    names = ("intermediate_size", "n_inner", "moe_intermediate_size")
    given = [getattr(config, name, None) for name in names]
    return {size for size in given if size} or {4 * config.hidden_size}


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed of its own for each use, below 2^63."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _check_allowed(rotation: Rotation, adapter: Adapter, config: Any) -> None:
    unknown = "its modules are not known"
    for key, obstacle in (
        ("residual", adapter.residual_obstacle(config)),
        ("value", None if adapter.value_rotation else unknown),
        ("attention", None if adapter.attention else unknown),
        ("down", None if adapter.down_rotation else unknown),
    ):
        kind = getattr(rotation, key)
        if kind != "none" and obstacle is not None:
            raise RotqError(
                f"rotation.{key}={kind} is not possible for {adapter.family} models "
                f"({', '.join(adapter.architectures)}): {obstacle}; set rotation.{key}=none"
            )


def _draw(key: str, kind: str, n: int, seed: int) -> Tensor:
    try:
        return orthogonal(kind, n, seed)
    except ValueError as error:
        raise RotqError(f"rotation.{key}={kind}: {error}") from None


def _describe_online(key: str, sizes: set[int]) -> str:
    try:
        for size in sizes:
            core_order(size)
    except ValueError as error:
        raise RotqError(f"rotation.{key}=hadamard: {error}; set rotation.{key}=none") from None
    return ", ".join(describe("hadamard", size) for size in sorted(sizes))
