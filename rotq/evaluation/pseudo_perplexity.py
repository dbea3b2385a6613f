"""Pseudo-perplexity of a masked language model on proteins, and what it costs to quantize it.

    masked      exp(-mean_i log p(x_i | x without i)): one forward pass for each scored residue
    one pass    exp(-mean_i log p(x_i | x)): nothing is masked, one pass for each sequence. It sees
                the answer, so it is low; it shows differences, and compares with nothing else
    accuracy    share of masked residues whose most likely token is the residue
    KL, top-1   of a reference to the model, at the masked residues; as in ``divergence``

Only residues are scored: no special tokens, no padding, no X, B, Z or J, nothing unknown to the
vocabulary. (Salazar et al., arXiv 1910.14659.)

Shape suffixes: B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rotq.calibration.fasta import Record
from rotq.calibration.limits import Limits
from rotq.calibration.residues import ResidueCodec
from rotq.devices import double
from rotq.errors import RotqError
from rotq.evaluation.divergence import Divergence, compare
from rotq.evaluation.passes import batches_of_rows, run_rows
from rotq.models.limits import limits_of


@dataclass(frozen=True, kw_only=True)
class PLLProtocol:
    """Which sequences of a file are scored, and which of their residues."""

    sequences: int = 32
    """Taken from the start of a file; 0 takes all."""
    max_length: int = 512
    """Residues; of a longer sequence the first ones are taken."""
    positions: int = 0
    """Masked residues of a sequence, drawn at random; 0 takes all."""
    batch_tokens: int = 8192
    """Of a forward pass, padding included where there is some; a single row may have more."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("sequences", 0), ("max_length", 1), ("positions", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is not {least} or more")

    def within(self, limits: Limits, num_special: int) -> PLLProtocol:
        """The same, with sequences that fit a model's positions together with special tokens.

        Raises:
            RotqError: no residue fits.
        """
        return replace(self, max_length=limits.cut(self.max_length, special=num_special))

    def cut(self, records: Sequence[Record]) -> list[str]:
        """The sequences that are scored, as far as they are."""
        wanted = records[: self.sequences or None]
        return [record.sequence[: self.max_length] for record in wanted]

    def describe(self, records: Sequence[Record]) -> str:
        """One line that names the protocol."""
        cut = sum(len(record.sequence) > self.max_length for record in records)
        masked = f"{self.positions} residues masked" if self.positions else "each residue masked"
        return (
            f"{masked} one at a time in each of {len(records)} sequences"
            + (f", {cut} of them cut to {self.max_length} residues" if cut else "")
            + "; ambiguous residues not scored"
        )


@dataclass(frozen=True, kw_only=True)
class PLLEvaluation:
    """Figures of one model on one set of sequences."""

    masked: float
    one_pass: float
    accuracy: float
    kl: float | None
    """Nats per masked residue; None without a reference, as all that follow."""
    top1: float | None
    reference_masked: float | None
    reference_one_pass: float | None
    reference_accuracy: float | None
    sequences: int
    residues: int
    """Residues that were masked, one at a time."""
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One sequence, and the positions that are scored in it."""

    ids: list[int]
    positions: list[int]
    targets: list[int]


@dataclass
class _Sums:
    """Running sums of one model over scored positions."""

    nll: float = 0.0
    correct: int = 0
    positions: int = 0

    def add(self, logits_MV: Tensor, target_M: Tensor) -> None:
        log_p_MV = logits_MV.float().log_softmax(-1)
        self.nll -= float(double(log_p_MV.gather(1, target_M[:, None])).sum())
        self.correct += int((logits_MV.argmax(-1) == target_M).sum())
        self.positions += len(target_M)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / self.positions, 700.0))

    @property
    def accuracy(self) -> float:
        return self.correct / self.positions


@torch.inference_mode()
def evaluate_pll(
    model: Any,
    records: Sequence[Record],
    codec: ResidueCodec,
    *,
    protocol: PLLProtocol,
    reference: Any = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> PLLEvaluation:
    """Score proteins with a masked language model.

    Sequences are cut to the positions of both models.

    Args:
        model: Of transformers, on any device.
        records: What ``protocol`` takes its sequences from.
        codec: Of the model's tokenizer.
        reference: The model to compare with; same vocabulary.
        on_batch: Called with forward passes done and in all.

    Raises:
        RotqError: no residue to score, vocabularies differ, a token id outside the vocabulary, or
            logits that are not finite.
    """
    limits = limits_of(model)
    if reference is not None:
        limits = limits.within(limits_of(reference))
    protocol = protocol.within(limits, codec.num_special)
    taken = list(records[: protocol.sequences or None])
    whole = [_whole_row(sequence, codec) for sequence in protocol.cut(taken)]
    if not any(row.positions for row in whole):
        raise RotqError("there is no residue to score")
    used = {codec.mask_id, codec.pad_id}.union(*(row.ids for row in whole))
    limits.check(torch.tensor(sorted(used)))
    generator = torch.Generator().manual_seed(protocol.seed)
    masked = [one for row in whole for one in _masked_rows(row, codec, protocol, generator)]
    models = [model] if reference is None else [model, reference]
    sums = {kind: [_Sums() for _ in models] for kind in ("masked", "one pass")}
    divergence = Divergence()
    seen = [row for row in whole if row.positions]
    passes = [
        (kind, batch)
        for kind, rows in (("one pass", seen), ("masked", masked))
        for batch in _batches(models, rows, protocol.batch_tokens)
    ]
    for done, (kind, rows) in enumerate(passes):
        target_M = torch.tensor([target for row in rows for target in row.targets])
        found = [_scored_logits(each, rows, codec) for each in models]
        for total, logits_MV in zip(sums[kind], found, strict=True):
            total.add(logits_MV, target_M.to(logits_MV.device))
        if reference is not None and kind == "masked":
            divergence += compare(found[1].to(found[0].device), found[0], chunk=len(target_M))
        if on_batch is not None:
            on_batch(done + 1, len(passes))
    ours, theirs = ([sums[kind][i] for kind in sums] for i in (0, len(models) - 1))
    alone = reference is None
    return PLLEvaluation(
        masked=ours[0].perplexity,
        one_pass=ours[1].perplexity,
        accuracy=ours[0].accuracy,
        kl=None if alone else divergence.kl,
        top1=None if alone else divergence.top1,
        reference_masked=None if alone else theirs[0].perplexity,
        reference_one_pass=None if alone else theirs[1].perplexity,
        reference_accuracy=None if alone else theirs[0].accuracy,
        sequences=len(taken),
        residues=ours[0].positions,
        protocol=protocol.describe(taken),
    )


def _scored_logits(model: Any, rows: Sequence[_Row], codec: ResidueCodec) -> Tensor:
    """(scored positions of all rows, V)."""
    done = run_rows(model, [row.ids for row in rows], codec.pad_id)
    found = [done.logits(b)[row.positions] for b, row in enumerate(rows)]
    return codec.by_residue(torch.cat(found))


def _whole_row(sequence: str, codec: ResidueCodec) -> _Row:
    ids = codec.encode(sequence)
    places = range(len(codec.around[0]), len(ids) - len(codec.around[1]))
    scored = [place for place in places if ids[place] in codec.scored]
    return _Row(ids=ids, positions=scored, targets=[ids[place] for place in scored])


def _masked_rows(
    row: _Row, codec: ResidueCodec, protocol: PLLProtocol, generator: torch.Generator
) -> Iterator[_Row]:
    places = row.positions
    if protocol.positions and protocol.positions < len(places):
        order = torch.randperm(len(places), generator=generator)[: protocol.positions]
        places = [places[index] for index in order.sort().values.tolist()]
    for place in places:
        ids = [*row.ids[:place], codec.mask_id, *row.ids[place + 1 :]]
        yield _Row(ids=ids, positions=[place], targets=[row.ids[place]])


def _batches(models: Sequence[Any], rows: Sequence[_Row], tokens: int) -> list[list[_Row]]:
    """Rows of like length, as many as ``tokens`` hold."""
    batches = batches_of_rows(models, [row.ids for row in rows], tokens)
    return [[rows[index] for index in batch] for batch in batches]
