"""Token ids of a whole text, and what windows of them begin with.

Shape suffixes: N tokens of the text, B windows, P tokens that a window begins with, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotq.calibration.chats import ChatTemplate
from rotq.calibration.residues import ResidueCodec, reads_residues
from rotq.calibration.texts import Text
from rotq.calibration.tokens import beginning, encode, panics_unprinted
from rotq.errors import RotqError, told


def first_tokens(text: Text, tokenizer: Any, bos: str = "auto") -> tuple[int, ...]:
    """What every window of the text begins with, see ``beginning``.

    Nothing where every sequence of the text has special tokens of its own around it.
    """
    return () if _keeps_special(text, tokenizer) else beginning(tokenizer, bos)


def begun(ids_BT: Tensor, first: tuple[int, ...]) -> Tensor:
    """The windows behind the tokens that each begins with; without any, as they are."""
    if not first:
        return ids_BT
    first_BP = torch.tensor(first, dtype=ids_BT.dtype).expand(len(ids_BT), -1)
    return torch.cat((first_BP, ids_BT), dim=1)


def _keeps_special(text: Text, tokenizer: Any) -> bool:
    return bool(text.records and reads_residues(tokenizer) and ResidueCodec(tokenizer).num_special)


def tokenize(text: Text, tokenizer: Any) -> Tensor:
    """Token ids of the whole text, int64 (N,); special tokens only around FASTA sequences.

    Chats are written as the tokenizer's own template has them, special tokens included.

    Raises:
        RotqError: the tokenizer finds no token in it, or fails on it, or has no template for its
            chats; names the text.
    """
    if _keeps_special(text, tokenizer):
        codec = ResidueCodec(tokenizer)
        ids = [id for record in text.records for id in codec.encode(record.sequence)]
    else:
        try:
            with panics_unprinted():
                ids = encode(tokenizer, _written(text, tokenizer))
        except RotqError as error:
            raise RotqError(f"text {text.source}: {error}") from error.__cause__
    if not ids:
        raise RotqError(f"text {text.source} holds no tokens")
    return torch.tensor(ids, dtype=torch.int64)


def _written(text: Text, tokenizer: Any) -> str:
    """The text, with every chat in it as the model's template writes it."""
    if not text.parts:
        return text.content
    if not getattr(tokenizer, "chat_template", None):
        raise RotqError("it holds messages, and the tokenizer has no chat template to write them")
    template = ChatTemplate(tokenizer, generation=False)
    with told("the chat template fails"):
        parts = [
            part if isinstance(part, str) else template.render([*map(template.fitted, part)])
            for part in text.parts
        ]
    return "\n".join(parts)
