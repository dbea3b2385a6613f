"""Scoring several checkpoints on one text, for ``rotq compare`` and ``rotq report``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from rotq.cli.eval import scored_tokens
from rotq.cli.loading import choose, device_map, run_dtype, say_computed, say_device, show

if TYPE_CHECKING:
    from torch import Tensor

    from rotq.checkpoint.location import Location
    from rotq.evaluation.perplexity import Protocol
    from rotq.report import JobReport


@dataclass(frozen=True, kw_only=True)
class Text:
    """What checkpoints are scored on, and how."""

    source: str
    protocol: Protocol
    bos: str
    seed: int
    """Of the draws behind intervals."""


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How models are loaded."""

    device: str
    dtype: str
    trust_remote_code: bool


@dataclass(kw_only=True)
class Comparison:
    """What ``compare_all`` has found."""

    report: dict[str, Any] = field(default_factory=dict)
    """Plain values, ready for JSON."""
    positions: dict[str, list[float]] = field(default_factory=dict)
    """KL by position, by checkpoint."""


Watched = Callable[[str, Any, "Tensor", "Protocol"], None]
"""Told a name, its model, the text's tokens and the protocol, while the model is loaded."""


def check_once(names: Sequence[str]) -> None:
    """Raise click.UsageError where a checkpoint is given twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise click.UsageError(f"{twice[0]} is given twice")


def compare_all(
    names: Sequence[str],
    places: Sequence[Location],
    reference: tuple[str, Location],
    text: Text,
    loading: Loading,
    *,
    watched: Watched | None = None,
) -> Comparison:
    """Score checkpoints one at a time, each against the reference.

    Raises:
        RotqError: a model or the text cannot be read, or see ``score_windows``.
    """
    from rotq.checkpoint.load import load_model
    from rotq.evaluation.comparison import compare_scores, kl_by_position
    from rotq.evaluation.perplexity import score_windows

    chosen = choose(loading.device)
    original = reference[1]
    ids_N, protocol = scored_tokens(
        [original, *places],
        text.source,
        text.protocol,
        bos=text.bos,
        trust_remote_code=loading.trust_remote_code,
    )
    say_device(loading.device, chosen)
    options: dict[str, Any] = {
        "dtype": run_dtype(loading.dtype),
        "device_map": device_map(chosen),
        "trust_remote_code": loading.trust_remote_code,
    }
    theirs = load_model(original, **options)
    told = say_computed(loading.dtype, (original, theirs))
    if watched is not None:
        watched(reference[0], theirs, ids_N, protocol)
    scores, costs, described = [], [], ""
    for name, place in zip(names, places, strict=True):
        # one at a time: only its scores are kept
        model = load_model(place, **options)
        told = say_computed(loading.dtype, (place, model), told=told)
        costs.append(_cost(place, model))
        score, described = score_windows(
            model,
            ids_N,
            protocol=protocol,
            reference=theirs,
            on_window=show(f"{place}: window"),
        )
        scores.append(score)
        if watched is not None:
            watched(name, model, ids_N, protocol)
    compared = compare_scores(scores, described, seed=text.seed)
    report = {
        "reference": reference[0],
        "text": text.source,
        "checkpoints": [
            {"name": name, **cost, **one.to_dict()}
            for name, cost, one in zip(names, costs, compared, strict=True)
        ],
    }
    positions = {name: kl_by_position(one) for name, one in zip(names, scores, strict=True)}
    return Comparison(report=report, positions=positions)


def job_report(place: Location) -> JobReport | None:
    """A checkpoint's own; None where rotq did not write it."""
    from rotq.checkpoint.gguf import find_gguf
    from rotq.checkpoint.inspection import read_checkpoint

    return None if find_gguf(place.path) is not None else read_checkpoint(place).report


def _cost(place: Location, model: Any) -> dict[str, Any]:
    """Bytes of the weights, and bits and seconds where a job's report has them."""
    from rotq.checkpoint.gguf import find_gguf

    report = job_report(place)
    if report is None:
        gguf = find_gguf(place.path)
        stored = gguf.stat().st_size if gguf is not None else _stored(place, model)
        return {"bytes": stored, "bits_all_in": None, "bits": None, "seconds": None}
    return {
        "bytes": report.bytes,
        "bits_all_in": report.bits_per_weight_all_in,
        "bits": report.bits_per_weight,
        "seconds": report.seconds,
    }


def _stored(place: Location, model: Any) -> int:
    """Bytes of a dense checkpoint's tensors; of a pickled one as they are loaded."""
    from rotq.checkpoint.weight_files import find_entries, leading_name

    if leading_name(place.path, {file.name for file in place.path.iterdir()}) is None:
        return int(model.get_memory_footprint())
    return sum(entry.num_bytes for entry in find_entries(place.path))
