"""Results of a job and of its estimate, as plain data; ``report.json`` is their dictionary.

No torch here: ``rotq inspect`` reads a report without it.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1


def quarters(losses: Sequence[float]) -> tuple[float, float]:
    """Means of a training's losses over the first and the last quarter of its steps."""
    quarter = max(1, len(losses) // 4)
    return sum(losses[:quarter]) / quarter, sum(losses[-quarter:]) / quarter


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """How one linear layer was quantized, and what it lost."""

    name: str
    """Full name of the module, as ``model.layers.3.mlp.down_proj``."""
    shape: tuple[int, int]
    """(out features, in features)."""
    bits: int
    group_size: int
    """Columns per scale that were used; -1 per channel."""
    symmetric: bool
    loss: float
    """tr(dW H dW^T), H the weighted mean of x x^T over calibration tokens; H = I without data."""
    relative_error: float
    """loss / tr(W H W^T)."""
    damping: float
    """Share of the mean Hessian diagonal that was added in the end."""
    seconds: float
    bits_per_weight: float
    """Codes, scales and zero points."""


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """What one decoder block cost to quantize, all its layers together."""

    index: int
    seconds: float
    peak_rss: int
    """Of the process until the block's end, in bytes."""


@dataclass(frozen=True, kw_only=True)
class Flatness:
    """How evenly the inputs of one site use a quantizer's range, see ``evaluation.flatness``."""

    max_over_rms: float
    kurtosis: float
    spread: float
    """Largest variance of a feature over the mean variance."""
    log_qsur: float | None
    """log QSUR^(1/d); None where the sample has no more tokens than the site has features."""


@dataclass(frozen=True, kw_only=True)
class JobReport:
    """The content of ``report.json``: what a job was given, made and measured."""

    recipe: dict[str, Any]
    """As resolved; a job repeats from it."""
    model: str
    model_hash: str
    """sha256 over config and weights of the source."""
    data: dict[str, Any]
    """source, sha256 and tokens of the calibration text."""
    versions: dict[str, str]
    layers: tuple[LayerResult, ...]
    blocks: tuple[BlockResult, ...]
    bits_per_weight: float
    """Mean over the quantized linears; codes, scales and zero points."""
    bits_per_weight_all_in: float
    """8 * bytes / parameters of the checkpoint: embedding, head, norms and headers too."""
    bytes: int
    """All weight files of the checkpoint."""
    original_bytes: int
    """The source's parameters at its own dtype."""
    seconds: float
    peak_rss: int
    """Largest resident memory of the process, in bytes."""
    mixed: dict[str, float] = field(default_factory=dict)
    """Under ``weights.average_bits``: the average that was asked for, and the rise of the KL to the
    original that was predicted of the grids that were chosen, nats per token."""
    rotation: dict[str, Any] = field(default_factory=dict)
    """Name of each rotation, and the figure of the function-preservation check."""
    transform: dict[str, Any] = field(default_factory=dict)
    """How the rotations were found: losses, angles, ranges of scales."""
    importance: dict[str, float] = field(default_factory=dict)
    """Effective sample size per layer, as a share of the calibration tokens."""
    outer: tuple[LayerResult, ...] = ()
    """Embedding and head, where they were packed."""
    experts: dict[str, list[int]] = field(default_factory=dict)
    """Calibration tokens that the router sent to each expert, by full name of the mixture."""
    codes: dict[str, dict[str, float]] = field(default_factory=dict)
    """By block, where codes were trained: relative error of its output, first and last steps."""
    tuning: dict[str, float] = field(default_factory=dict)
    """Steps, and KL to the original on the calibration windows of the first and last quarter."""
    flatness: dict[str, dict[str, dict[str, float | None]]] = field(default_factory=dict)
    """By full name of the site ("model.layers.3.down"): fields of ``Flatness`` before and after
    the rotations; empty where nothing is rotated or rounded at run time."""
    notes: tuple[str, ...] = ()
    """Warnings, each a line for people."""
    commit: str = ""
    """Of the hub's repository ``model``; empty for a local folder."""
    evaluation: dict[str, Any] | None = None
    """Of the checkpoint against the source: ppl, reference_ppl, kl, top1, tokens, protocol."""
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, ready for JSON."""
        values = dataclasses.asdict(self)
        for layer in (*values["layers"], *values["outer"]):
            layer["shape"] = list(layer["shape"])
        for name in ("layers", "outer", "blocks", "notes"):
            values[name] = list(values[name])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> JobReport:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: another schema version, or a key is missing or unknown.
        """
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"report has schema_version {version}, expected {SCHEMA_VERSION}")
        try:
            layers = _layers(values["layers"])
            outer = _layers(values.get("outer", ()))
            blocks = tuple(BlockResult(**block) for block in values["blocks"])
            notes = tuple(values["notes"])
            made = {"layers": layers, "outer": outer, "blocks": blocks, "notes": notes}
            return cls(**{**values, **made})
        except (KeyError, TypeError) as error:
            raise ValueError(f"report does not fit schema {SCHEMA_VERSION}: {error}") from None


def _layers(values: Iterable[dict[str, Any]]) -> tuple[LayerResult, ...]:
    return tuple(LayerResult(**{**layer, "shape": tuple(layer["shape"])}) for layer in values)


@dataclass(frozen=True, kw_only=True)
class SiteEstimate:
    """One linear layer of a dry run."""

    name: str
    shape: tuple[int, int]
    """(out features, in features)."""
    bits: int
    group_size: int
    bits_per_weight: float
    choices: tuple[tuple[int, int], ...] = ()
    """(bits, group size) that the job will choose from; the first are those above."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job would make and need, from the config alone."""

    sites: tuple[SiteEstimate, ...]
    bits_per_weight: float
    """Mean over the quantized linears."""
    output_bytes: int
    peak_memory_bytes: int
    scratch_disk_bytes: int
    memory_steps: dict[str, int] = field(default_factory=dict)
    """Bytes of each step of the job; the process itself and the streams are there in all."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of one processor, by phase; empty where none are predicted."""
    wall_seconds: float | None = None
    """That pass if the processors do nothing else."""
    notes: tuple[str, ...] = ()
    """Each a line for people."""
    limits: tuple[float, float] | None = None
    """Least and most bits per weight that the job can choose; None where it has no choice."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, ready for JSON."""
        values = dataclasses.asdict(self)
        values["sites"] = [
            {**site, "shape": list(site["shape"]), "choices": [list(c) for c in site["choices"]]}
            for site in values["sites"]
        ]
        values["notes"] = list(values["notes"])
        return values
