"""Text in, token windows out: what calibration runs on.

A text is tokenized whole without special tokens, and calibration windows are drawn from it with a
seeded generator, as GPTQ's own script does:

    start_b ~ uniform{0 .. n - T - 2},     ids_b = ids[start_b : start_b + T]

Where the tokenizer puts a BOS before a text, every window begins with it and has as many tokens
fewer of the text (``beginning``): Gemma 3 270M has perplexity 35 without it and 19 with it.
A window is no longer than the model has positions, special tokens counted, and holds ids that the
model has embeddings for (``limits``).
FASTA sequences follow each other with the special tokens that the tokenizer puts around each, or
else are joined by a newline; for a masked language model they are windows of their own (see
``proteins``).

Shape suffixes: N tokens of the text, B windows, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rotq.calibration.batches import Batch
from rotq.calibration.limits import Limits
from rotq.calibration.proteins import draw_proteins
from rotq.calibration.residues import ResidueCodec, reads_residues
from rotq.calibration.sampled import SampledText, sampled_first
from rotq.calibration.sequences import parse_proteins
from rotq.calibration.texts import SELF, Text, is_own_text, read_text
from rotq.calibration.tokenized import begun, first_tokens, tokenize
from rotq.errors import RotqError
from rotq.recipe import Calibration


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Token windows for calibration, in batches, and the text they were drawn from."""

    batches: tuple[Batch, ...]
    """Tensors on the CPU."""
    source: str
    """The file, id or corpus name as it was given."""
    sha256: str
    """Of the text's file or content, see ``Text``."""
    tokens: int
    """Tokens of the whole text, or residues of the file, that the windows were drawn from."""
    notes: tuple[str, ...] = ()
    """What is to be said about the text and the windows, a line each."""

    @property
    def ids_BT(self) -> Tensor:
        """All windows, where all have one length."""
        return torch.cat([batch.ids_BT for batch in self.batches])

    @property
    def first_BT(self) -> Tensor:
        """The first window, (1, T)."""
        return next(self.each())

    def each(self) -> Iterator[Tensor]:
        """Window by window, (1, T) without padding."""
        for batch in self.batches:
            for ids_T, length in zip(batch.ids_BT, batch.lengths(), strict=True):
                yield ids_T[None, :length]

    @property
    def num_tokens(self) -> int:
        """Tokens in all windows, padding left out."""
        return sum(batch.num_tokens for batch in self.batches)


Write = Callable[[tuple[int, ...], int, int, int], SampledText]
"""Windows of the model's own text from first tokens, number, length and seed."""


def load_windows(
    calibration: Calibration,
    tokenizer: Any,
    limits: Limits,
    *,
    masked: bool = False,
    write: Write | None = None,
) -> Windows:
    """Draw the calibration windows of a recipe.

    Args:
        calibration: Texts and their shares, number and length of the windows, seed.
        tokenizer: A transformers tokenizer.
        limits: Of the model; windows are cut to its positions.
        masked: The model fills in masked tokens.
        write: Samples the model's own text, where the recipe asks for it. Without, zeros stand for
            it, and its digest is that of what decides it.

    Raises:
        RotqError: a text is missing, empty, in an unknown encoding (names the byte), too short
            or holds a token that the model does not know; or a masked language model of proteins is
            given something else than FASTA.
    """
    texts = calibration.texts
    counts = shared(calibration.num_samples, [text.share for text in texts])
    drawn = [
        _of_one_text(
            replace(calibration, source=text.source, mix=(), num_samples=count),
            tokenizer,
            limits,
            masked,
            write or _unwritten,
        )
        for text, count in zip(texts, counts, strict=True)
    ]
    return drawn[0] if len(drawn) == 1 else _together(drawn)


def shared(total: int, shares: Sequence[float]) -> list[int]:
    """``total`` windows by shares, at least one each; the largest remainders are rounded up."""
    spare = total - len(shares)
    exact = [spare * share / sum(shares) for share in shares]
    counts = [1 + int(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda n: int(exact[n]) - exact[n])
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts


def _of_one_text(
    calibration: Calibration, tokenizer: Any, limits: Limits, masked: bool, write: Write
) -> Windows:
    if is_own_text(calibration.source):
        return _own_windows(calibration, tokenizer, limits, masked, write)
    text = read_text(calibration.source)
    if masked and reads_residues(tokenizer):
        return _protein_windows(calibration, text, ResidueCodec(tokenizer), limits)
    first = first_tokens(text, tokenizer, calibration.bos)
    return _text_windows(calibration, text, tokenize(text, tokenizer), first, limits)


def _own_windows(
    calibration: Calibration, tokenizer: Any, limits: Limits, masked: bool, write: Write
) -> Windows:
    """Windows that the model writes, each from its first token on."""
    if masked:
        raise RotqError(
            f"calibration text {SELF}: a masked language model does not write; name a text"
        )
    first = sampled_first(tokenizer, calibration.bos)
    length = limits.cut(calibration.seq_len, least=len(first) + 1)
    written = write(first, calibration.num_samples, length, calibration.seed)
    limits.check(written.ids_BT, SELF)
    return Windows(
        batches=tuple(Batch(ids_BT=part) for part in written.ids_BT.split(calibration.batch_size)),
        source=SELF,
        sha256=written.sha256,
        tokens=written.ids_BT.numel(),
        notes=_notes(limits.note(calibration.seq_len, length)),
    )


def _unwritten(first: tuple[int, ...], num_windows: int, length: int, seed: int) -> SampledText:
    digest = hashlib.sha256(repr((SELF, first, num_windows, length, seed)).encode()).hexdigest()
    ids_BT = torch.tensor(first[:1]).expand(num_windows, length)
    return SampledText(ids_BT=ids_BT, sha256=digest)


def _together(drawn: Sequence[Windows]) -> Windows:
    """Windows of several texts, batches in turn, so that the first few are of all of them."""
    ranked = [
        ((number + 0.5) / len(windows.batches), batch)
        for windows in drawn
        for number, batch in enumerate(windows.batches)
    ]
    return Windows(
        batches=tuple(batch for _, batch in sorted(ranked, key=lambda entry: entry[0])),
        source=", ".join(windows.source for windows in drawn),
        sha256=hashlib.sha256("".join(windows.sha256 for windows in drawn).encode()).hexdigest(),
        tokens=sum(windows.tokens for windows in drawn),
        notes=tuple(dict.fromkeys(note for windows in drawn for note in windows.notes)),
    )


def _protein_windows(
    calibration: Calibration, text: Text, codec: ResidueCodec, limits: Limits
) -> Windows:
    text = text if text.records else _as_proteins(text)
    length = limits.cut(calibration.seq_len, least=codec.num_special + 1)
    batches = draw_proteins(replace(calibration, seq_len=length), text.records, codec)
    for batch in batches:
        limits.check(batch.ids_BT, text.source)
    lengths = [len(record.sequence) for record in text.records]
    cut = codec.num_special + max(lengths) > length
    return Windows(
        batches=batches,
        source=text.source,
        sha256=text.sha256,
        tokens=sum(lengths),
        notes=_notes(limits.note(calibration.seq_len, length) if cut else "", text.note),
    )


def _as_proteins(text: Text) -> Text:
    """A file of proteins by another name, or the refusal of one that is none."""
    try:
        proteins = parse_proteins(text.source, text.content.encode("utf-8"))
    except RotqError as error:
        raise RotqError(
            f"calibration text {text.source}: the model reads proteins, so calibration.source must "
            f"be a file of them (FASTA, A3M, PIR, a table or a list): {error}"
        ) from None
    note = f"{text.source}, read as proteins: {proteins.describe()}"
    return replace(text, records=proteins.records, note=note)


def _text_windows(
    calibration: Calibration, text: Text, ids_N: Tensor, first: tuple[int, ...], limits: Limits
) -> Windows:
    length = limits.cut(calibration.seq_len, least=len(first) + 1)
    if length <= len(first):
        raise RotqError(
            f"calibration.seq_len={length} leaves no room behind {len(first)} special tokens"
        )
    ids_BT = begun(_draw(calibration, text.source, ids_N, length - len(first)), first)
    limits.check(ids_BT, text.source)
    return Windows(
        batches=tuple(Batch(ids_BT=part) for part in ids_BT.split(calibration.batch_size)),
        source=text.source,
        sha256=text.sha256,
        tokens=int(ids_N.numel()),
        notes=_notes(limits.note(calibration.seq_len, length), text.note),
    )


def _draw(calibration: Calibration, source: str, ids_N: Tensor, length: int) -> Tensor:
    """Windows of the text, (B, T); some may be drawn more than once."""
    num_starts, wanted = ids_N.numel() - length - 1, calibration.num_samples
    if num_starts < 1:
        raise RotqError(
            f"calibration text {source} is too short: {ids_N.numel()} tokens, windows of "
            f"{length} need at least {length + 2}"
        )
    if wanted > num_starts:
        raise RotqError(
            f"calibration text {source} is too short: {ids_N.numel()} tokens hold {num_starts} "
            f"different windows of {length}, of {wanted} asked for; ask for fewer or shorter ones"
        )
    generator = torch.Generator().manual_seed(calibration.seed)
    starts = torch.randint(0, num_starts, (wanted,), generator=generator)
    return torch.stack([ids_N[start : start + length] for start in starts.tolist()])


def _notes(*lines: str) -> tuple[str, ...]:
    return tuple(filter(None, lines))
