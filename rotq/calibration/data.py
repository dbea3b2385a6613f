"""Text in, token windows out: files, ``datasets`` ids, and a corpus that ships with Python.

A text is read whole, tokenized whole without special tokens, and calibration windows are drawn
from it with a seeded generator, as GPTQ's own script does:

    start_b ~ uniform{0 .. n - T - 2},     ids_b = ids[start_b : start_b + T]

Records (JSONL lines, rows of a data set) are joined by an empty line. FASTA sequences follow each
other with the special tokens that the tokenizer puts around each, or else are joined by a newline;
for a masked language model they are windows of their own (see ``proteins``).

Shape suffixes: N tokens of the text, B windows, T positions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotq.calibration.batches import Batch
from rotq.calibration.fasta import Record, decompress, is_fasta, parse_fasta
from rotq.calibration.proteins import draw_proteins
from rotq.calibration.residues import ResidueCodec, reads_residues
from rotq.errors import RotqError
from rotq.recipe import Calibration

HELD_OUT_TOPICS = ("debugger", "string-methods", "types")
"""Topics of ``pydoc_data`` that ``pydoc`` leaves to ``pydoc-test``.

Several topics quote each other at length; of the phrases of 13 words in these, the others hold 3.
"""

_FILE_SUFFIXES = (".txt", ".text", ".md", ".raw", ".json", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text and where it came from."""

    source: str
    """The file, id or corpus name as it was given."""
    content: str
    sha256: str
    """Of the file's bytes; of the UTF-8 content where there is no file."""
    records: tuple[Record, ...] = ()
    """Of a FASTA file."""
    note: str = ""
    """What was found in a FASTA file, and what was left out of it."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """What calibration runs on."""

    batches: tuple[Batch, ...]
    """On the CPU."""
    source: str
    """The file, id or corpus name as it was given."""
    sha256: str
    """Of the text."""
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
        """Tokens in the windows."""
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


def read_text(source: str, *, split: str = "train") -> Text:
    """Read a text by file name, corpus name or ``datasets`` id.

    Args:
        source: A UTF-8 file, or one that gzip made of it (``.jsonl``: the ``text`` field of each
            line; ``.fasta``, ``.fa``, ``.faa``, ``.fas``: the sequences, see ``fasta``; anything
            else as it is), ``pydoc`` or ``pydoc-test``, or ``ID[:CONFIG][:SPLIT]`` of the
            ``datasets`` library; its ``text`` column is taken.
        split: Split of a data set where ``source`` names none.

    Raises:
        RotqError: missing, empty, not UTF-8, or without the text field; names the source.
    """
    path = Path(source).expanduser()
    if path.is_file():
        text = _read_file(source, path)
    elif source in ("pydoc", "pydoc-test"):
        text = _of_content(source, _pydoc(held_out=source == "pydoc-test"))
    elif (
        Path(source.lower().removesuffix(".gz")).suffix in _FILE_SUFFIXES
        or is_fasta(source)
        or source.startswith((".", "~"))
    ):
        raise RotqError(f"text {source}: no such file")
    else:
        text = _of_content(source, "\n\n".join(_dataset_rows(source, split)))
    if not text.content.strip():
        raise RotqError(f"text {source} is empty")
    return text


def _of_content(source: str, content: str) -> Text:
    digest = hashlib.sha256(content.encode("utf-8")).hexdigest()
    return Text(source=source, content=content, sha256=digest)


def _read_file(source: str, path: Path) -> Text:
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise RotqError(f"text {source}: {error.strerror}") from None
    sha256 = hashlib.sha256(stored).hexdigest()
    data = decompress(source, stored)
    try:
        # line ends as Python's text mode gives them: \r\n costs tokens that other tools do not see
        content = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise RotqError(
            f"text {source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None
    if is_fasta(source) and content.strip():
        proteins = parse_fasta(source, data)
        return Text(
            source=source,
            content="\n".join(record.sequence for record in proteins.records),
            sha256=sha256,
            records=proteins.records,
            note=proteins.describe(),
        )
    if Path(source.lower().removesuffix(".gz")).suffix == ".jsonl":
        content = "\n\n".join(_json_records(source, content))
    return Text(source=source, content=content, sha256=sha256)


def _json_records(source: str, content: str) -> Iterable[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise RotqError(f"text {source}, line {number}: not JSON: {error.msg}") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise RotqError(f'text {source}, line {number}: no string field "text"')
        yield text


def _pydoc(*, held_out: bool) -> str:
    from pydoc_data.topics import topics

    names = sorted(name for name in topics if (name in HELD_OUT_TOPICS) == held_out)
    return "\n\n".join(topics[name].strip() for name in names)


def _dataset_rows(source: str, split: str) -> list[str]:
    import datasets

    name, *rest = source.split(":")
    if len(rest) > 2:
        raise RotqError(f"text {source}: expected ID[:CONFIG][:SPLIT]")
    split = rest.pop() if rest else split
    try:
        rows = datasets.load_dataset(name, rest[0] if rest else None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise RotqError(f"text {source}: no such file, and datasets says: {reason}") from None
    if "text" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise RotqError(f'text {source}: the data set has no column "text", only {columns}')
    return [text for text in rows["text"] if text]
