"""Residues to token ids, for tokenizers that give each residue an id of its own.

Protein models spell a sequence in one of three ways, and the tokenizer is asked which:

    MKT       ESM-2
    M K T     BERT's word tokenizer
    M#K#T#    SaProt: each token is a residue and a letter of Foldseek's 3Di alphabet, # where the
              structure is not known, as here; a residue is masked as ##, and its probability is the
              sum over all letters (Su et al., SaProt, ICLR 2024)

Letters that a vocabulary lacks become its X, or else its unknown token.

Shape suffixes: M places, V vocabulary.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from rotq.calibration.fasta import AMBIGUOUS
from rotq.calibration.tokens import encode, panics_unprinted
from rotq.errors import RotqError

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 of the genetic code."""
LETTERS = RESIDUES + "UOXBZJ"
UNKNOWN_STRUCTURE = "#"
NEVER = -1e4
"""Logit of a token that was counted elsewhere; finite, since 0 times infinity is not a number."""


class ResidueCodec:
    """Sequences to ids and back.

    Args:
        tokenizer: Of transformers.

    Raises:
        RotqError: it does not give each of the 20 residues an id of its own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        found = _spelling(tokenizer)
        if found is None:
            raise RotqError(
                f"{type(tokenizer).__name__} does not give each residue a token of its own"
            )
        self.separator, self.suffix = found

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
        ids = _probe(self.tokenizer, f"A{self.suffix}", special=True)
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
        if self.suffix:
            return int(self.tokenizer.convert_tokens_to_ids(2 * UNKNOWN_STRUCTURE))
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

    def by_residue(self, logits_MV: Tensor) -> Tensor:
        """Logits whose columns ``ids`` stand for residues, whatever the structure; dtype as given.

        Args:
            logits_MV: (..., V); not modified. Given back where tokens are residues alone.
        """
        if not self.suffix:
            return logits_MV
        found_MV = logits_MV.clone()
        for token, columns in self._columns.items():
            total_M = logits_MV[..., columns].logsumexp(-1)
            found_MV[..., columns] = NEVER
            found_MV[..., token] = total_M
        return found_MV

    @cached_property
    def _columns(self) -> dict[int, list[int]]:
        """Of each residue's id: the ids of its tokens with all letters of structure."""
        pairs = [item for item in self.tokenizer.get_vocab().items() if len(item[0]) == 2]
        return {
            id: sorted(other for token, other in pairs if token[0] == letter)
            for letter, id in self.ids.items()
        }

    def _id(self, letter: str) -> int:
        if letter in self.ids:
            return self.ids[letter]
        other = self.ids.get("X", self.tokenizer.unk_token_id)
        if other is None:
            raise RotqError(f"{type(self.tokenizer).__name__} knows neither {letter!r} nor X")
        return int(other)

    def _plain(self, letter: str) -> list[int]:
        return _probe(self.tokenizer, letter + self.suffix)


def reads_residues(tokenizer: Any) -> bool:
    """Whether each of the 20 residues is a token of its own."""
    return _spelling(tokenizer) is not None


def _spelling(tokenizer: Any) -> tuple[str, str] | None:
    """What has to stand between residues, and behind each; None where they are not tokens.

    Neighbours in this probe are words in no vocabulary that was learned from proteins.
    """
    for separator, suffix in (("", ""), (" ", ""), ("", UNKNOWN_STRUCTURE)):
        given = separator.join(letter + suffix for letter in RESIDUES + RESIDUES[::-1])
        ids = _probe(tokenizer, given)
        known = set(ids) - {tokenizer.unk_token_id}
        if len(ids) == 2 * len(RESIDUES) and len(known) == len(RESIDUES):
            return separator, suffix
    return None


def _probe(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    with panics_unprinted():
        return encode(tokenizer, text, special=special)
