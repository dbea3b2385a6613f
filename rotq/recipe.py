"""The recipe: every choice of a quantization job, typed, frozen and checked.

A recipe is a YAML file with one section per stage. Unknown keys are refused with the nearest
known name, values are checked for type and range, and ``to_dict`` gives back what was resolved,
so that a job repeats from its own output.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True, kw_only=True)
class Override:
    """Other weights for the layers whose full name matches."""

    match: str
    """Regular expression, searched in the full module name."""
    bits: int = 0
    """Bits per code, 2 to 8; 0 keeps the recipe's."""
    group_size: int = 0
    """Columns per scale, -1 per channel; 0 keeps the recipe's."""
    keep: bool = False
    """Leave these layers unquantized."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match is not a regular expression: {error}") from None
        _check("bits", self.bits, self.bits == 0 or 2 <= self.bits <= 8, "2 to 8, or 0")
        _check("group_size", self.group_size, self.group_size >= -1, "positive, -1 or 0")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The grid that weights are rounded to."""

    bits: int = 4
    """Bits per code, 2 to 8."""
    group_size: int = 128
    """Columns that share a scale; -1 is one scale per output channel."""
    group_fallback: Literal["error", "auto"] = "error"
    """Where the group size does not divide: stop, or take the largest legal one below it."""
    symmetric: bool = False
    """No zero points."""
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Storage type of the scales."""
    overrides: tuple[Override, ...] = ()
    """Mixed precision: the first match wins."""

    def __post_init__(self) -> None:
        _check("bits", self.bits, 2 <= self.bits <= 8, "2 to 8")
        _check(
            "group_size",
            self.group_size,
            self.group_size == -1 or self.group_size > 0,
            "positive or -1",
        )


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Exact changes of basis, fused into the weights unless marked online."""

    residual: Literal["none", "hadamard", "block_hadamard", "dct"] = "none"
    """R1: one basis for the residual stream."""
    value: Literal["none", "hadamard", "block_hadamard", "dct"] = "none"
    """R2: per KV head, between v_proj and o_proj."""
    down: Literal["none", "hadamard"] = "none"
    """R4: before down_proj, online; only the rotq format can express it."""
    attention: Literal["none", "hadamard"] = "none"
    """R3: queries and keys behind RoPE, online; only the rotq format can express it."""
    seed: int = 0
    """Seed of the random signs."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What the quantized linear layers read, rounded at run time with a scale per token."""

    bits: int = 16
    """Bits per code, 2 to 8; 16 leaves activations as they are."""
    symmetric: bool = False
    """No zero points."""

    def __post_init__(self) -> None:
        _check("bits", self.bits, _codes_or_off(self.bits), "2 to 8, or 16")


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys (behind RoPE) and values, rounded at run time with a scale per head and token."""

    bits: int = 16
    """Bits per code, 2 to 8; 16 leaves keys and values as they are."""
    symmetric: bool = False
    """No zero points."""

    def __post_init__(self) -> None:
        _check("bits", self.bits, _codes_or_off(self.bits), "2 to 8, or 16")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The text that statistics are taken from."""

    source: str = "pydoc"
    """A .txt, .jsonl or .fasta file, a ``datasets`` id, or ``pydoc`` (ships with Python)."""
    masked: float = 0.15
    """Share of residues that a masked language model of proteins finds masked."""
    num_samples: int = 64
    """Windows drawn."""
    seq_len: int = 1024
    """Tokens per window."""
    batch_size: int = 4
    """Windows per forward pass."""
    seed: int = 0
    """Seed of the draw."""
    offload: bool = False
    """Keep the activation streams in files in the job folder instead of in memory."""
    precision: Literal["highest", "medium"] = "medium"
    """fp32 matrix products of the calibration passes: fp32, or bf16 products with fp32 sums."""
    flatness_tokens: int = 2048
    """Tokens on which the report's figures of flatness are taken, where something is rotated or
    rounded at run time; 0 leaves them out."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len", "batch_size"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _check("flatness_tokens", self.flatness_tokens, self.flatness_tokens >= 0, "0 or more")
        _check("masked", self.masked, 0 <= self.masked < 1, "0 or more, below 1")


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How much each calibration token counts (RSQ, arXiv 2503.01820)."""

    strategy: Literal[
        "none",
        "attention",
        "first_n",
        "token_frequency",
        "activation_norm",
        "activation_difference",
        "token_similarity",
    ] = "none"
    """What a token's score is."""
    scaling: Literal["minmax", "quantile", "sink"] = "quantile"
    """How scores become weights: min-max, 1 %-99 % min-max, or min-max with sinks left out."""
    floor: float = 0.1
    """Weight of the least important token; the most important one has 1."""
    power: Literal[1, 2] = 1
    """Exponent on the weights: 1 as RSQ's code does, 2 as its formula says."""
    first_n: float = 0.125
    """Share of the window that ``first_n`` favours."""

    def __post_init__(self) -> None:
        _check("floor", self.floor, 0 < self.floor <= 1, "above 0, at most 1")
        _check("first_n", self.first_n, 0 < self.first_n <= 1, "above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How codes and scales are found."""

    method: Literal["rtn", "gptq"] = "gptq"
    """Round to nearest, or GPTQ (arXiv 2210.17323)."""
    order: Literal["natural", "activation"] = "activation"
    """Columns as stored, or by falling Hessian diagonal with fixed scales (static act-order)."""
    damping: float = 0.01
    """Share of the mean Hessian diagonal added to it; raised if it does not factor."""
    scale_search: Literal["minmax", "mse", "diagonal", "hessian"] = "hessian"
    """Judge of a candidate scale: none, |error|^2.4, or the error under H (diagonal or block)."""
    search_steps: int = 24
    """Candidate shrink factors."""
    target_correction: float = 0.0
    """alpha in W + alpha (W* - W), W* the least-squares optimum for the quantized inputs."""
    target_correction_down: float = -1.0
    """The same for the last linear of the MLP; -1 takes ``target_correction``."""
    passes: Literal[1, 2, 3, 4] = 4
    """Calibration passes per block: 4 quantizes q/k/v, o, gate/up and down one after the other,
    each seeing the ones before it rounded; fewer joins the last ones, which is faster."""
    refine_sweeps: int = 0
    """After GPTQ: alternations of exact scale refinement and coordinate descent on the codes."""

    def __post_init__(self) -> None:
        _check("damping", self.damping, 0 < self.damping <= 1, "above 0, at most 1")
        _check("search_steps", self.search_steps, self.search_steps >= 1, "at least 1")
        alpha = self.target_correction
        _check("target_correction", alpha, 0 <= alpha <= 1, "0 to 1")
        down = self.target_correction_down
        _check("target_correction_down", down, down == -1 or 0 <= down <= 1, "0 to 1, or -1")
        _check("refine_sweeps", self.refine_sweeps, self.refine_sweeps >= 0, "0 or more")

    @property
    def needs_original(self) -> bool:
        """Whether the solver compares with the original model's activations."""
        correction = max(self.target_correction, self.target_correction_down)
        return self.method == "gptq" and correction > 0


@dataclass(frozen=True, kw_only=True)
class Transform:
    """How the rotations are found, and scalings between layers with them."""

    method: Literal["fixed", "optrot", "learned", "auto"] = "fixed"
    """As drawn; by the weights' fourth powers, without data (OptRot, arXiv 2512.24124); trained
    through the model with rounding faked (OSTQuant, arXiv 2501.13987); or the best by ``judge``."""
    scalings: tuple[Literal["qkv", "gate_up", "value", "query_key", "up"], ...] = ()
    """Between norm and q/k/v, norm and gate/up, v and o, q and k, up and down."""
    balance: tuple[Literal["qkv", "gate_up", "value", "query_key", "up"], ...] = ()
    """Of the scalings: those that start at their closed form instead of at one."""
    parametrization: Literal["cayley", "qr", "householder"] = "cayley"
    """Of orthogonal matrices in training; qr and householder are experimental."""
    down: Literal["fixed", "butterfly"] = "fixed"
    """R4 in training: as drawn, or a butterfly, the fast transform with an angle for every pair."""
    objective: Literal["kl_top", "cross_entropy", "block_mse"] = "kl_top"
    """Of ``steps``: KL on the likely tokens of the original model, the text itself (SpinQuant), or
    each block's squared error on the original model's inputs, as a share of its output."""
    top_k: int = 1000
    """Likely tokens per position."""
    layer_steps: int = 0
    """Of ``learned``: steps on the expected error of single layers, before those through the
    model; each looks at some blocks."""
    layer_angle: float = 0.04
    """Rms angle in radians that such a step turns a matrix by, at most."""
    layer_scale_rate: float = 0.03
    """Relative change of a scale in such a step, at most."""
    steps: int = 64
    """Steps of Adam; ``learned`` takes one window per step, ``optrot`` some blocks' weights."""
    angle: float = 0.02
    """Rms angle in radians that a step turns a matrix by, at most."""
    scale_rate: float = 0.02
    """Relative change of a scale per step, at most."""
    seq_len: int = 0
    """Tokens from the start of a calibration window that are trained on; 0 takes the window."""
    save_every: int = 16
    """Steps between two states on the disk that a stopped job continues from."""
    candidates: tuple[Literal["none", "hadamard", "optrot", "learned"], ...] = (
        "none",
        "hadamard",
        "optrot",
    )
    """Of ``auto``."""
    judge: Literal["proxy", "kl"] = "proxy"
    """Of ``auto``: expected error of rounding summed over layers, or KL on held-out windows."""

    def __post_init__(self) -> None:
        for name in ("top_k", "save_every"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in (
            "angle",
            "scale_rate",
            "layer_angle",
            "layer_scale_rate",
            "layer_steps",
            "steps",
        ):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _check("seq_len", self.seq_len, self.seq_len >= 0, "0 or more")
        among = set(self.balance) <= set(self.scalings)
        _check("balance", self.balance, among, "among the scalings")
        _check("candidates", self.candidates, bool(self.candidates), "one or more")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """After all blocks: train scales, norm gains and biases on the KL to the original model."""

    steps: int = 0
    """Steps of Adam, each on one calibration window; 0 leaves everything as solved."""
    learning_rate: float = 0.003
    """Relative change of a scale, or of a vector against its rms, per step."""
    seq_len: int = 0
    """Tokens from the start of a window that are trained on; 0 takes the window. Masked language
    models, which see both sides, are always given the window."""

    def __post_init__(self) -> None:
        _check("steps", self.steps, self.steps >= 0, "0 or more")
        _check("seq_len", self.seq_len, self.seq_len >= 0, "0 or more")
        _check("learning_rate", self.learning_rate, self.learning_rate > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class Output:
    """What is written."""

    format: Literal["compressed-tensors", "rotq"] = "compressed-tensors"
    """compressed-tensors loads in transformers and vLLM; rotq also holds online rotations."""
    max_shard_gb: float = 5.0
    """Largest safetensors file, in 10^9 bytes."""

    def __post_init__(self) -> None:
        _check("max_shard_gb", self.max_shard_gb, self.max_shard_gb > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One job, whole."""

    name: str = "default"
    """Equal to the name of its file."""
    weights: Weights = field(default_factory=Weights)
    rotation: Rotation = field(default_factory=Rotation)
    transform: Transform = field(default_factory=Transform)
    activations: Activations = field(default_factory=Activations)
    kv_cache: KVCache = field(default_factory=KVCache)
    calibration: Calibration = field(default_factory=Calibration)
    importance: Importance = field(default_factory=Importance)
    solver: Solver = field(default_factory=Solver)
    tuning: Tuning = field(default_factory=Tuning)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        if self.transform.down == "butterfly":
            if self.rotation.down == "none":
                raise ValueError(
                    "transform.down=butterfly starts at R4; set rotation.down=hadamard (and "
                    "output.format=rotq, which alone can express what is applied at run time)"
                )
            if self.transform.method == "fixed":
                raise ValueError(
                    "transform.down=butterfly is trained; set transform.method=learned"
                )
        if self.output.format == "rotq":
            return
        for key, wanted in (
            ("rotation.down", self.rotation.down != "none"),
            ("rotation.attention", self.rotation.attention != "none"),
            ("kv_cache.bits", self.kv_cache.bits != 16),
        ):
            if wanted:
                raise ValueError(
                    f"{key} is applied at run time, which only output.format=rotq can express"
                )
        if self.activations.bits != 16 and not self.weights.symmetric:
            raise ValueError(
                "activations.bits: other loaders of compressed-tensors drop the rounding of "
                "activations where weights have zero points; set weights.symmetric=true or "
                "output.format=rotq"
            )

    @property
    def needs_original(self) -> bool:
        """Whether the original model's activations are wanted next to the quantized one's."""
        return self.solver.needs_original or self.tuning.steps > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as ``from_dict`` takes them."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))


def load_recipe(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """Resolve a recipe: overrides > file > defaults.

    Args:
        path: YAML file; None takes the defaults.
        overrides: Dotted key to value, for example ``{"solver.damping": 0.02}``. Strings are read
            as YAML scalars.

    Raises:
        ValueError: unreadable YAML, unknown key, wrong type or value out of range; one line.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: a recipe is a mapping, got {type(values).__name__}")
    for key, value in overrides.items():
        _set(values, key, yaml.safe_load(value) if isinstance(value, str) else value)
    try:
        return from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from None


def from_dict(values: dict[str, Any]) -> Recipe:
    """Build a recipe; unknown keys and wrong types raise ValueError with the key's full name."""
    return typing.cast(Recipe, _build(Recipe, values, ""))


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"{dotted}: {section} is not a section")
    values[last] = value


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix or 'recipe'}: expected a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = (
                f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(sorted(hints))}"
            )
            raise ValueError(f"unknown key {full}; {hint}")
        arguments[key] = _convert(hints[key], value, full)
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"{prefix or 'recipe'}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{key}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value is None and "none" in arguments:
            value = "none"
        if value not in arguments or isinstance(value, bool):
            raise ValueError(f"{key}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{key}: expected a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{key}: expected {hint.__name__}, got {value!r}")
    return value


def _check(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {value!r} is not {allowed}")


def _codes_or_off(bits: int) -> bool:
    return 2 <= bits <= 8 or bits == 16


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
