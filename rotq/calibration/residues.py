"""Residues to token ids, for tokenizers that give each residue an id of its own.

Protein models spell a sequence in one of two ways: ``MKT`` (ESM-2) or ``M K T`` (BERT's word
tokenizer). Which one is asked of the tokenizer itself. Letters that a vocabulary lacks become its
X, or else its unknown token.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from rotq.calibration.fasta import AMBIGUOUS
from rotq.calibration.tokens import encode, panics_unprinted
from rotq.errors import RotqError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 of the genetic code."""
LETTERS = RESIDUES + "UOXBZJ"


class ResidueCodec:
    """Sequences to ids and back.

    Args:
        tokenizer: Of transformers.

    Raises:
        RotqError: it does not give each of the 20 residues an id of its own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.separator = _separator(tokenizer)
        if self.separator is None:
            raise RotqError(
                f"{type(tokenizer).__name__} does not give each residue a token of its own"
            )

    @cached_property
    def ids(self) -> dict[str, int]:
        """Letter to id, without the letters that the vocabulary lacks."""
        unknown = self.tokenizer.unk_token_id
        found = {letter: self._plain(letter) for letter in LETTERS}
        return {
            letter: ids[0] for letter, ids in found.items() if len(ids) == 1 and ids[0] != unknown
        }

    @cached_property
    def scored(self) -> frozenset[int]:
        """Ids that stand for one residue."""
        return frozenset(id for letter, id in self.ids.items() if letter not in AMBIGUOUS)

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer puts before and behind a sequence."""
        ids = _probe(self.tokenizer, "A", special=True)
        place = ids.index(self.ids["A"])
        return ids[:place], ids[place + 1 :]

    @property
    def num_special(self) -> int:
        """Number of special tokens around a sequence."""
        return sum(map(len, self.around))

    @property
    def mask_id(self) -> int:
        """Id of the mask token.

        Raises:
            RotqError: there is none.
        """
        if self.tokenizer.mask_token_id is None:
            raise RotqError(f"{type(self.tokenizer).__name__} has no mask token")
        return int(self.tokenizer.mask_token_id)

    @property
    def pad_id(self) -> int:
        """Id for padding; any will do where there is none, as padding is masked."""
        return int(self.tokenizer.pad_token_id or 0)

    def encode(self, sequence: str) -> list[int]:
        """Ids of one sequence between its special tokens.

        Raises:
            RotqError: a letter has no id, and neither has X nor the unknown.
        """
        first, last = self.around
        return [*first, *(self._id(letter) for letter in sequence), *last]

    def _id(self, letter: str) -> int:
        if letter in self.ids:
            return self.ids[letter]
        other = self.ids.get("X", self.tokenizer.unk_token_id)
        if other is None:
            raise RotqError(f"{type(self.tokenizer).__name__} knows neither {letter!r} nor X")
        return int(other)

    def _plain(self, letter: str) -> list[int]:
        return _probe(self.tokenizer, letter)


def reads_residues(tokenizer: Any) -> bool:
    """Whether each of the 20 residues is a token of its own."""
    return _separator(tokenizer) is not None


def _separator(tokenizer: Any) -> str | None:
    """What has to stand between residues; None where they are not tokens.

    Neighbours in this probe are words in no vocabulary that was learned from proteins.
    """
    for separator in ("", " "):
        given = separator.join(RESIDUES + RESIDUES[::-1])
        ids = _probe(tokenizer, given)
        known = set(ids) - {tokenizer.unk_token_id}
        if len(ids) == 2 * len(RESIDUES) and len(known) == len(RESIDUES):
            return separator
    return None


def _probe(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    with panics_unprinted():
        return encode(tokenizer, text, special=special)
