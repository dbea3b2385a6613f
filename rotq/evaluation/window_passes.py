"""Passes of a model over windows of a protein, and what is read at single places.

Shape suffixes: B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rotq.calibration.residues import ResidueCodec
from rotq.devices import double
from rotq.evaluation.passes import batches_of_rows, run_rows

_AT_A_TIME = 256
"""Passes whose rows are sorted by length together."""

Progress = Callable[[int, int], None] | None
"""Told passes done and in all."""


class MaskedRow(NamedTuple):
    """Token ids of one pass, and the place that is read."""

    ids: list[int]
    place: int


def optimal_window(place: int, length: int, window: int) -> tuple[int, int]:
    """Start and end of the tokens around one of them: ProteinGym's rule.

    Args:
        place: The token, from 0.
        length: Tokens of the whole.
        window: Tokens that the model takes.
    """
    half = window // 2
    if length <= window or place < half:
        return 0, min(window, length)
    if place >= length - half:
        return length - window, length
    return place - half, place + half


def overlapping_windows(length: int, window: int) -> list[int]:
    """Starts of windows that overlap by half; the last one ends with the whole."""
    last = max(length - window, 0)
    return [*range(0, last, max(window // 2, 1)), last]


def nearest_window(starts: Sequence[int], place: int, window: int) -> int:
    """The window that has most tokens on the poorer side of a place."""
    return max(starts, key=lambda start: min(place - start, start + window - 1 - place))


def read_rows(
    model: Any,
    rows: Iterable[MaskedRow],
    total: int,
    codec: ResidueCodec,
    batch_tokens: int,
    progress: Progress,
) -> Iterator[Tensor]:
    """log p at each row's place, fp64 (V,) on the CPU, in the order of the rows.

    Args:
        model: A masked language model of transformers, on any device.
        rows: Made as they are needed.
        total: How many there are.
        codec: Of the model's tokenizer.
        batch_tokens: Of a forward pass, padding included; a single row may have more.
        progress: Called after each pass.

    Raises:
        RotqError: logits that are not finite.
    """
    done = 0
    for some in _chunks(rows, _AT_A_TIME):
        found: dict[int, Tensor] = {}
        for batch in batches_of_rows([model], [row.ids for row in some], batch_tokens):
            passed = run_rows(model, [some[index].ids for index in batch], codec.pad_id)
            for b, index in enumerate(batch):
                logits_V = passed.logits(b)[some[index].place]
                found[index] = codec.by_residue(double(logits_V)).log_softmax(-1).cpu()
            done += len(batch)
            if progress is not None:
                progress(done, total)
        yield from (found[index] for index in range(len(some)))


def _chunks(rows: Iterable[MaskedRow], size: int) -> Iterator[list[MaskedRow]]:
    some: list[MaskedRow] = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
