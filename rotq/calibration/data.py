"""Text in, token windows out: what calibration runs on.

A text is tokenized whole without special tokens, and calibration windows are drawn from it with a
seeded generator, as GPTQ's own script does:

    start_b ~ uniform{0 .. n - T - 2},     ids_b = ids[start_b : start_b + T]

FASTA sequences follow each other with the special tokens that the tokenizer puts around each, or
else are joined by a newline; for a masked language model they are windows of their own (see
``proteins``).

Shape suffixes: N tokens of the text, B windows, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotq.calibration.batches import Batch
from rotq.calibration.proteins import draw_proteins
from rotq.calibration.residues import ResidueCodec, reads_residues
from rotq.calibration.texts import Text, read_text
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
    note: str = ""

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


def load_windows(calibration: Calibration, tokenizer: Any, *, masked: bool = False) -> Windows:
    """Draw the calibration windows of a recipe.

    Args:
        calibration: Source, number and length of the windows, seed.
        tokenizer: A transformers tokenizer.
        masked: The model fills in masked tokens.

    Raises:
        RotqError: the text is missing, empty, not UTF-8 (names the byte), or too short; or a
            masked language model of proteins is given something else than FASTA.
    """
    text = read_text(calibration.source)
    if masked and reads_residues(tokenizer):
        return _protein_windows(calibration, text, ResidueCodec(tokenizer))
    return _text_windows(calibration, text, tokenize(text, tokenizer))


def _protein_windows(calibration: Calibration, text: Text, codec: ResidueCodec) -> Windows:
    if not text.records:
        raise RotqError(
            f"calibration text {text.source}: the model reads proteins, so calibration.source "
            "must be a FASTA file"
        )
    return Windows(
        batches=draw_proteins(calibration, text.records, codec),
        source=text.source,
        sha256=text.sha256,
        tokens=sum(len(record.sequence) for record in text.records),
        note=f"{text.source}: {text.note}",
    )


def _text_windows(calibration: Calibration, text: Text, ids_N: Tensor) -> Windows:
    num_starts = ids_N.numel() - calibration.seq_len - 1
    if num_starts < 1:
        raise RotqError(
            f"calibration text {text.source} is too short: {ids_N.numel()} tokens, windows of "
            f"{calibration.seq_len} need at least {calibration.seq_len + 2}"
        )
    generator = torch.Generator().manual_seed(calibration.seed)
    starts = torch.randint(0, num_starts, (calibration.num_samples,), generator=generator)
    ids_BT = torch.stack([ids_N[start : start + calibration.seq_len] for start in starts.tolist()])
    return Windows(
        batches=tuple(Batch(ids_BT=part) for part in ids_BT.split(calibration.batch_size)),
        source=text.source,
        sha256=text.sha256,
        tokens=int(ids_N.numel()),
    )


def tokenize(text: Text, tokenizer: Any) -> Tensor:
    """Token ids of the whole text, int64 (N,); special tokens only around FASTA sequences.

    Raises:
        RotqError: the tokenizer finds no token in it.
    """
    if text.records and reads_residues(tokenizer) and ResidueCodec(tokenizer).num_special:
        codec = ResidueCodec(tokenizer)
        ids = [id for record in text.records for id in codec.encode(record.sequence)]
    elif getattr(tokenizer, "is_fast", False):
        # no offsets: half the time and memory, which a text of some MB makes count
        backend = tokenizer.backend_tokenizer
        ids = backend.encode_batch_fast([text.content], add_special_tokens=False)[0].ids
    else:
        ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise RotqError(f"text {text.source} holds no tokens")
    return torch.tensor(ids, dtype=torch.int64)
