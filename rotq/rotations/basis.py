"""The bases of one job, and the factors that go with them.

    R1  residual stream, one (D, D) matrix                  fused
    R2  value heads, one (K, K) matrix per KV head          fused
    R3  queries and keys behind RoPE, Hadamard              online
    R4  input of the MLP's last linear, Hadamard            online, may be in diagonal blocks
    S   positive factors between layers, see ``Scales``     fused

Shape suffixes: D hidden size, H KV heads, K head size, E experts, I features between up and down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from rotq.rotations.hadamard import random_signs


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
class Ends:
    """R1 applied at run time, in front of the first block and backwards behind the last."""

    signs_D: Tensor
    """int8: R1 is diag(signs) H / sqrt(D)."""
    last_block: int


@dataclass(frozen=True, kw_only=True)
class Basis:
    """Orthogonal matrices; activations are rows and are multiplied from the right."""

    residual_DD: Tensor | None = None
    """R1, fp64; None leaves the residual stream and the norm gains alone."""
    ends: Ends | None = None
    """Of R1, where nothing outside the blocks has it fused."""
    value: tuple[Tensor, ...] | None = None
    """R2, per layer (H, K, K) fp64."""
    attention: str | None = None
    """R3: kind of the online transform; it has no signs."""
    down: str | None = None
    """R4: kind of the online transform."""
    down_block_size: int | None = None
    """Features of a diagonal block of R4, all blocks equal; None for one block."""
    inputs: bool = False
    """Whether R4 stands in front of every linear layer of a block, and not of the last alone."""
    down_seed: int = 0
    """Seed of R4's signs, the same in every layer."""
    scales: tuple[Scales, ...] | None = None
    """Per layer, fp64; None changes no scale."""
    description: dict[str, str] = field(default_factory=dict)
    """Recipe key to what was built, for example residual: hadamard 36x16."""

    @property
    def is_identity(self) -> bool:
        """Nothing is changed."""
        return not self.tensors() and self.attention is None and self.down is None

    @property
    def turns_outer(self) -> bool:
        """Whether what lies outside the blocks is in R1's basis too."""
        return self.residual_DD is not None and self.ends is None

    def tensors(self) -> dict[str, Tensor]:
        """Every matrix and vector by name: residual, value.LAYER, LAYER.scales.NAME."""
        named = {} if self.residual_DD is None else {"residual": self.residual_DD}
        named |= {f"value.{layer}": matrix for layer, matrix in enumerate(self.value or ())}
        for layer, scales in enumerate(self.scales or ()):
            named |= {f"{layer}.scales.{name}": factors for name, factors in scales.items()}
        return named

    def with_tensors(self, named: dict[str, Tensor]) -> Basis:
        """The same kinds of transforms with other values; ``named`` as from ``tensors``."""
        value: dict[int, Tensor] = {}
        scales: dict[int, dict[str, Tensor]] = {}
        for name, tensor in named.items():
            layer, _, key = name.partition(".scales.")
            if key:
                scales.setdefault(int(layer), {})[key] = tensor
            elif name.startswith("value."):
                value[int(name.removeprefix("value."))] = tensor
        return replace(
            self,
            residual_DD=named.get("residual"),
            value=tuple(value[layer] for layer in sorted(value)) or None,
            scales=tuple(Scales.of(scales[layer]) for layer in sorted(scales)) or None,
        )

    def down_signs(self, features: int) -> Tensor:
        """R4's signs, int8, as many as are rotated together: of a block, or of all features."""
        return random_signs(self.down_block_size or features, self.down_seed)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices and factors: fp64, but for a basis in training."""
        return next((tensor.dtype for tensor in self.tensors().values()), torch.float64)

    def checksum(self) -> str:
        """sha256 over all entries rounded to 2^-40, the online kinds and R4's seed."""
        online = f"{self.down} {self.down_seed}"
        if self.attention is not None:
            online += f" {self.attention}"
        if self.down_block_size is not None:
            online += f" blocks of {self.down_block_size}"
        if self.ends is not None:
            online += " ends"
        if self.inputs:
            online += " inputs"
        digest = hashlib.sha256(online.encode())
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update((tensor * 2.0**40).round().long().numpy().tobytes())
        return digest.hexdigest()
