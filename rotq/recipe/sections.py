"""Sections of a recipe: what is rounded to what, how codes are found, and what is written.

The string below a field is its documentation.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Literal

FLOATS = {"nvfp4": (4, 16), "mxfp4": (4, 32), "fp8": (8, -1), "fp8_block": (8, 128)}
"""Bits and group size of weights that are no integers."""


def check(name: str, value: object, holds: bool, allowed: str) -> None:
    """Raise ValueError, in one line, if a field's value is out of its range."""
    if not holds:
        raise ValueError(f"{name}: {shown(value)} is not {allowed}")


def check_seed(seed: int) -> None:
    """Raise ValueError if torch's generators cannot be seeded with it."""
    check("seed", seed, -(2**63) <= seed < 2**63, "from -2^63 to 2^63 - 1")


def shown(value: object) -> str:
    """A value for a message: as Python writes it, but short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def codes_or_off(bits: int) -> bool:
    """Whether ``bits`` are those of integer codes, or 16 for none."""
    return 2 <= bits <= 8 or bits == 16


@dataclass(frozen=True, kw_only=True)
class Override:
    """Other weights for the layers whose full name matches."""

    match: str
    """Regular expression, searched in the full module name."""
    bits: int = 0
    """Bits per code, 2 to 8, on a trellis 1 to 8; 0 keeps the recipe's."""
    group_size: int = 0
    """Columns per scale, -1 per channel; 0 keeps the recipe's."""
    keep: bool = False
    """Leave these layers as they are, unquantized."""

    def __post_init__(self) -> None:
        check("match", self.match, len(self.match) <= 1000, "at most 1000 characters long")
        try:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                re.compile(self.match)
        except (re.error, OverflowError) as error:
            raise ValueError(f"match is not a regular expression: {error}") from None
        except RecursionError:
            raise ValueError("match is nested too deep for a regular expression") from None
        check("bits", self.bits, 0 <= self.bits <= 8, "1 to 8, or 0")
        check("group_size", self.group_size, -1 <= self.group_size <= 10**6, "-1 to 1000000")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The grid that weights are rounded to."""

    format: Literal["int", "nvfp4", "mxfp4", "fp8", "fp8_block"] = "int"
    """Integers, or floats: nvfp4 has 4 bits in groups of 16 with scales in E4M3 and one factor for
    each weight, mxfp4 4 bits in groups of 32 with powers of two, fp8 8 bits (E4M3) and a scale for
    each output channel, fp8_block the same with a scale for 128 x 128 weights. All are
    symmetric."""
    bits: int = 4
    """Bits per code, 2 to 8; with solver.rounder=trellis 1 to 8."""
    state_bits: int = 12
    """Of solver.rounder=trellis: L, 8 to 16. A weight is one of 2^L levels; the search takes twice
    the time for each more."""
    average_bits: float = 0.0
    """In place of ``bits`` and ``group_size``: 2, 3 or 4 bits and groups for each layer, so that
    the quantized layers have this many bits per weight together, scales and zero points counted,
    and the loss of the model rises least. 0 gives every layer ``bits``."""
    group_size: int = 128
    """Columns that share a scale; -1 is one scale per output channel."""
    group_fallback: Literal["error", "auto"] = "error"
    """Where the group size does not divide: stop, or take the largest legal one below it."""
    symmetric: bool = False
    """Scales alone; otherwise a zero point goes with every scale."""
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Storage type of the scales."""
    embedding: int = 16
    """Bits per code of the token embedding, 2 to 8, symmetric; 16 leaves it dense."""
    head: int = 16
    """The same of a head with a weight of its own; one that is tied shares the embedding's."""
    outer_group_size: int = 64
    """Columns of embedding and head that share a scale; -1 is one scale per token."""
    outer_fallback: Literal["error", "dense"] = "error"
    """Where they cannot be packed, or the format's loaders would not read them so: stop, or leave
    them dense and say so."""
    overrides: tuple[Override, ...] = ()
    """Mixed precision: the first match wins."""

    def __post_init__(self) -> None:
        check("bits", self.bits, 1 <= self.bits <= 8, "1 to 8")
        check("state_bits", self.state_bits, 8 <= self.state_bits <= 16, "8 to 16")
        check("embedding", self.embedding, codes_or_off(self.embedding), "2 to 8, or 16")
        check("head", self.head, codes_or_off(self.head), "2 to 8, or 16")
        average = self.average_bits
        check("average_bits", average, average == 0 or 2 <= average <= 8, "2 to 8, or 0")
        number = len(self.overrides)
        check("number of overrides", number, number <= 1000, "at most 1000")
        for name in ("group_size", "outer_group_size"):
            size = getattr(self, name)
            check(name, size, size == -1 or 0 < size <= 10**6, "positive or -1")


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Exact changes of basis, fused into the weights unless marked online."""

    residual: Literal["none", "hadamard", "block_hadamard", "dct"] = "none"
    """R1: one basis for the residual stream."""
    residual_ends: Literal["fused", "online", "auto"] = "fused"
    """Where R1 begins and ends: fused into embedding and head, or applied at run time before the
    first block and taken back behind the last, which leaves a tied head tied. ``online`` is for
    R1 hadamard, RMSNorm and the rotq format; ``auto`` takes it there where the head is tied."""
    value: Literal["none", "hadamard", "block_hadamard", "dct"] = "none"
    """R2: per KV head, between v_proj and o_proj."""
    block_size: int = -1
    """Features of a block of R1 and R2 where they are block_hadamard, -1 for the largest power of
    two that divides; and of ``inputs``."""
    down: Literal["none", "hadamard"] = "none"
    """R4: before down_proj, online; only the rotq format can express it."""
    down_block_size: int = -1
    """R4 in diagonal blocks of so many features, each rotated by itself; -1 for one block of all.
    Under tensor parallelism ranks that hold whole blocks rotate without asking each other."""
    attention: Literal["none", "hadamard"] = "none"
    """R3: queries and keys behind RoPE, online; only the rotq format can express it."""
    inputs: Literal["none", "hadamard"] = "none"
    """In front of every linear layer of the blocks, online, in blocks of ``block_size``: for nvfp4
    and mxfp4, whose groups of 16 and 32 are rotated behind the norms' gains (MR-GPTQ, arXiv
    2509.23202); only the rotq format can express it."""
    seed: int = 0
    """Seed of the random signs."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        size = self.down_block_size
        check("down_block_size", size, size == -1 or 2 <= size <= 10**6, "at least 2, or -1")
        if size != -1 and self.down == "none":
            raise ValueError(
                "down_block_size is of R4; set rotation.down=hadamard, or leave it out"
            )
        self._check_blocks()
        if self.residual_ends != "fused" and self.residual != "hadamard":
            raise ValueError(
                f"residual_ends={self.residual_ends} applies a Hadamard matrix at run time; set "
                "rotation.residual=hadamard, or leave it out"
            )

    def _check_blocks(self) -> None:
        size, has_blocks = self.block_size, "block_hadamard" in (self.residual, self.value)
        check("block_size", size, size == -1 or 2 <= size <= 10**6, "at least 2, or -1")
        if self.inputs == "none" and size != -1 and not has_blocks:
            raise ValueError(
                "block_size is of block_hadamard and of inputs; set rotation.residual, "
                "rotation.value or rotation.inputs, or leave it out"
            )
        if self.inputs == "none":
            return
        if size == -1:
            raise ValueError("inputs are rotated in blocks: set rotation.block_size")
        if {self.residual, self.value, self.down} != {"none"}:
            raise ValueError(
                "rotation.inputs stands in front of every layer; set rotation.residual, "
                "rotation.value and rotation.down to none"
            )


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What the quantized linear layers read, rounded at run time with a scale per token, or as
    weights.format has them where that is none of integers."""

    bits: int = 16
    """Bits per code, 2 to 8; 16 leaves activations as they are. Floats have the weights' bits."""
    symmetric: bool = False
    """Scales alone; otherwise a zero point goes with every scale."""

    def __post_init__(self) -> None:
        check("bits", self.bits, codes_or_off(self.bits), "2 to 8, or 16")


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (behind RoPE) and values, rounded at run time with a scale per head and token."""

    bits: int = 16
    """Bits per code, 2 to 8; 16 leaves keys and values as they are."""
    symmetric: bool = False
    """Scales alone; otherwise a zero point goes with every scale."""

    def __post_init__(self) -> None:
        check("bits", self.bits, codes_or_off(self.bits), "2 to 8, or 16")


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How codes and scales are found."""

    method: Literal["rtn", "gptq"] = "gptq"
    """Round to nearest, or GPTQ (arXiv 2210.17323)."""
    rounder: Literal["scalar", "trellis"] = "scalar"
    """Each weight to the nearest of 2^bits levels, or each column to the best path through a
    trellis (QTIP, arXiv 2406.11235), for weights that rotations have made near to normal."""
    order: Literal["natural", "activation"] = "activation"
    """Columns as stored, or by falling Hessian diagonal with fixed scales (static act-order)."""
    damping: float = 0.01
    """Share of the mean Hessian diagonal added to it; raised if it does not factor."""
    scale_search: Literal["minmax", "mse", "diagonal", "hessian"] = "hessian"
    """Judge of a candidate scale: none, |error|^2.4, or the error under H (diagonal or block)."""
    target_correction: float = 0.0
    """alpha in W + alpha (W* - W), W* the least-squares optimum for the quantized inputs."""
    passes: Literal[1, 2, 3, 4] = 4
    """Calibration passes per block: 4 quantizes q/k/v, o, gate/up and down one after the other,
    each seeing the ones before it rounded; fewer joins the last ones, which is faster."""
    refine_sweeps: int = 0
    """After GPTQ: alternations of exact scale refinement and coordinate descent on the codes."""

    two_sided: bool = False
    """Errors of a layer's rows feed back on each other, too, by a second Hessian: that of the
    slopes of the model's own loss at the layer's output (YAQA, arXiv 2505.22988). Needs numba."""
    output_damping: float = 0.2
    """Of two_sided: share of that Hessian's mean diagonal added to it."""

    def __post_init__(self) -> None:
        check("damping", self.damping, 0 < self.damping <= 1, "above 0, at most 1")
        check(
            "output_damping", self.output_damping, 0 < self.output_damping <= 10, "above 0, to 10"
        )
        if self.two_sided and self.method != "gptq":
            raise ValueError("two_sided is of method=gptq")
        alpha = self.target_correction
        check("target_correction", alpha, 0 <= alpha <= 1, "0 to 1")
        check("refine_sweeps", self.refine_sweeps, 0 <= self.refine_sweeps <= 1000, "0 to 1000")

    @property
    def looks_at_hessian(self) -> bool:
        """Whether more than its factor is needed while columns are rounded and after."""
        judged = self.scale_search in ("diagonal", "hessian") or self.rounder == "trellis"
        return judged or self.refine_sweeps > 0 or self.two_sided

    @property
    def needs_original(self) -> bool:
        """Whether the solver compares with the original model's activations."""
        return self.method == "gptq" and self.target_correction > 0


@dataclass(frozen=True, kw_only=True)
class Output:
    """The format and the files of the checkpoint."""

    format: Literal["compressed-tensors", "rotq", "exl3"] = "compressed-tensors"
    """compressed-tensors loads in transformers and vLLM; rotq also holds online rotations; exl3
    holds paths through a trellis of 2^16 states, which exllamav3 and GPTQModel run."""
    max_shard_gb: float = 5.0
    """Largest safetensors file, in 10^9 bytes; a tensor that is larger has a file of its own."""

    def __post_init__(self) -> None:
        limit = self.max_shard_gb
        check("max_shard_gb", limit, 1e-9 <= limit <= 1e6, "from 1e-9, a byte, to 1000000")
