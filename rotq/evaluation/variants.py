"""How plausible a protein model finds variants of a protein: the scores that ProteinGym compares.

    masked-marginals    sum over mutations of log p(mutant) - log p(wild type), the position masked
                        in the wild type: one pass for each mutated position
    wt-marginals        the same with nothing masked: one pass for the protein
    pll                 sum_i log p(x_i | x without i) of the variant itself: one pass for each
                        residue of each variant
    likelihood          causal models: log p of the variant, read forwards and backwards, the mean

Formulae: Meier et al., ESM-1v (NeurIPS 2021), section 3; Notin et al., Tranception (arXiv
2205.13760). What is longer than the model's window is cut to the window around the masked position,
special tokens counted, as ProteinGym's ``get_optimal_window`` does; unmasked passes overlap by half
a window, and a position is read where it has most of the protein on either side.

Shape suffixes: B rows of a batch, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rotq.calibration.batches import padded
from rotq.calibration.residues import ResidueCodec
from rotq.devices import double
from rotq.errors import RotqError
from rotq.evaluation.assays import Assay, Substitution
from rotq.evaluation.passes import run_batch
from rotq.evaluation.window_passes import (
    MaskedRow,
    Progress,
    nearest_window,
    optimal_window,
    overlapping_windows,
    read_rows,
)

Kind = Literal["masked-marginals", "wt-marginals", "pll", "likelihood"]
MASKED_KINDS: tuple[Kind, ...] = ("masked-marginals", "wt-marginals", "pll")
CAUSAL_KINDS: tuple[Kind, ...] = ("likelihood",)


@dataclass(frozen=True, kw_only=True)
class VariantProtocol:
    """How variants are scored."""

    kinds: tuple[Kind, ...] = ("masked-marginals", "wt-marginals")
    window: int = 1024
    """Tokens of a pass, special tokens included."""
    batch_tokens: int = 8192
    """Of a forward pass, padding included; a single row may have more."""


@torch.inference_mode()
def score_variants(
    model: Any,
    codec: ResidueCodec,
    assay: Assay,
    protocol: VariantProtocol,
    on_pass: Callable[[str, int, int], None] | None = None,
) -> dict[Kind, list[float]]:
    """The scores of all variants, by kind; higher is more plausible.

    Args:
        model: Of transformers, on any device.
        codec: Of the model's tokenizer.
        assay: Its residues are those that the tokenizer knows.
        protocol: Its window fits the model.
        on_pass: Called with the kind, passes done and in all.

    Raises:
        RotqError: a residue that the vocabulary lacks, or logits that are not finite.
    """
    _check_residues(codec, assay)
    scorers = {
        "masked-marginals": _masked_marginals,
        "wt-marginals": _wild_type_marginals,
        "pll": _pseudo_likelihood,
        "likelihood": _likelihood,
    }
    found: dict[Kind, list[float]] = {}
    for kind in protocol.kinds:

        def progress(done: int, total: int, kind: str = kind) -> None:
            if on_pass is not None:
                on_pass(kind, done, total)

        found[kind] = scorers[kind](model, codec, assay, protocol, progress)
    return found


def _check_residues(codec: ResidueCodec, assay: Assay) -> None:
    mutants = {change.mutant for changes in assay.substitutions for change in changes}
    unknown = sorted((mutants | set(assay.wild_type)) - set(codec.ids))
    if unknown:
        raise RotqError(f"{assay.name}: the model's vocabulary lacks {', '.join(unknown)}")


def _masked_marginals(
    model: Any, codec: ResidueCodec, assay: Assay, protocol: VariantProtocol, progress: Progress
) -> list[float]:
    ids, before = codec.encode(assay.wild_type), len(codec.around[0])
    positions = _mutated(assay)
    rows = (_masked(ids, position + before, codec, protocol) for position in positions)
    log_p = read_rows(model, rows, len(positions), codec, protocol.batch_tokens, progress)
    by_position = dict(zip(positions, log_p, strict=True))
    return [_marginal(codec, changes, by_position) for changes in assay.substitutions]


def _wild_type_marginals(
    model: Any, codec: ResidueCodec, assay: Assay, protocol: VariantProtocol, progress: Progress
) -> list[float]:
    ids, before = codec.encode(assay.wild_type), len(codec.around[0])
    starts = overlapping_windows(len(ids), protocol.window)
    read: dict[int, list[int]] = {}
    for position in _mutated(assay):
        start = nearest_window(starts, position + before, protocol.window)
        read.setdefault(start, []).append(position)
    by_position: dict[int, Tensor] = {}
    for done, (start, positions) in enumerate(read.items(), 1):
        given = ids[start : start + protocol.window]
        logits_TV = run_batch(model, padded([given], codec.pad_id, frozenset())).logits[0]
        for position in positions:
            logits_V = codec.by_residue(double(logits_TV[position + before - start]))
            by_position[position] = logits_V.log_softmax(-1).cpu()
        if progress is not None:
            progress(done, len(read))
    return [_marginal(codec, changes, by_position) for changes in assay.substitutions]


def _pseudo_likelihood(
    model: Any, codec: ResidueCodec, assay: Assay, protocol: VariantProtocol, progress: Progress
) -> list[float]:
    before, length = len(codec.around[0]), len(assay.wild_type)

    def rows() -> Iterator[MaskedRow]:
        for variant in range(len(assay.mutants)):
            ids = codec.encode(assay.sequence(variant))
            for position in range(length):
                yield _masked(ids, position + before, codec, protocol)

    total = [0.0] * len(assay.mutants)
    passes = length * len(assay.mutants)
    for number, log_p_V in enumerate(
        read_rows(model, rows(), passes, codec, protocol.batch_tokens, progress)
    ):
        variant, position = divmod(number, length)
        letter = _letter(assay, variant, position)
        total[variant] += float(log_p_V[codec.ids[letter]])
    return total


def _likelihood(
    model: Any, codec: ResidueCodec, assay: Assay, protocol: VariantProtocol, progress: Progress
) -> list[float]:
    found = []
    for variant in range(len(assay.mutants)):
        sequence = assay.sequence(variant)
        both = [_forwards(model, codec, order, protocol) for order in (sequence, sequence[::-1])]
        found.append(sum(both) / 2)
        if progress is not None:
            progress(variant + 1, len(assay.mutants))
    return found


def _forwards(model: Any, codec: ResidueCodec, sequence: str, protocol: VariantProtocol) -> float:
    """log p of all tokens but the first; of those in several windows, where most stands before."""
    ids = codec.encode(sequence)
    total, scored = 0.0, 1
    for start in overlapping_windows(len(ids), protocol.window):
        given = ids[start : start + protocol.window]
        logits_TV = run_batch(model, padded([given], codec.pad_id, frozenset())).logits[0]
        log_p_TV = double(logits_TV[scored - start - 1 : -1]).log_softmax(-1)
        target_T = torch.tensor(given[scored - start :], device=log_p_TV.device)
        total += float(log_p_TV.gather(1, target_T[:, None]).sum())
        scored = start + len(given)
    return total


def _masked(
    ids: Sequence[int], place: int, codec: ResidueCodec, protocol: VariantProtocol
) -> MaskedRow:
    start, end = optimal_window(place, len(ids), protocol.window)
    return MaskedRow(
        ids=[*ids[start:place], codec.mask_id, *ids[place + 1 : end]], place=place - start
    )


def _marginal(
    codec: ResidueCodec, changes: Sequence[Substitution], log_p: dict[int, Tensor]
) -> float:
    return sum(
        float(log_p[c.position][codec.ids[c.mutant]] - log_p[c.position][codec.ids[c.wild]])
        for c in changes
    )


def _mutated(assay: Assay) -> list[int]:
    return sorted({change.position for changes in assay.substitutions for change in changes})


def _letter(assay: Assay, variant: int, position: int) -> str:
    changed = {change.position: change.mutant for change in assay.substitutions[variant]}
    return changed.get(position, assay.wild_type[position])
