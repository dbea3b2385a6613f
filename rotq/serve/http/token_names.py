r"""What tokens are called in log probabilities: by their text, or so that each differs from all.

A token that is a part of a character has no text. Another may read like one more (SentencePiece's
byte for "A" and the letter, unused rows of the vocabulary). Such tokens are called ``bytes:\xe2``
by what they add to a text, or else ``token_id:151700``: a table by name has an entry for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNFINISHED = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class TokenName:
    """How one token is spoken of."""

    name: str
    """Of this token only."""
    content: bytes | None
    """What it adds to a text; None where that is not known."""


class TokenNames:
    """Names of all tokens of a model.

    Args:
        tokenizer: Of transformers.
        vocabulary: Tokens that the model knows; the tokenizer may know fewer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        known = range(min(vocabulary, len(tokenizer)))
        spelled = [spelling or "" for spelling in tokenizer.convert_ids_to_tokens(list(known))]
        special = set(tokenizer.all_special_ids)
        texts = _texts(_decoder(tokenizer), known, special)
        byte_of = _byte_alphabet()
        contents: list[bytes | None] = [None] * vocabulary
        for token, (spelling, text) in enumerate(zip(spelled, texts, strict=True)):
            own = spelling if token in special else text
            contents[token] = _content(spelling, own, byte_of)
        # of two that read alike, the one that is no spelled-out byte is called by its text
        order = sorted(range(vocabulary), key=lambda token: _is_byte(spelled, token))
        taken: dict[str, int] = {}
        for token in order:
            names = _candidates(token, contents[token])
            taken[next(name for name in names if name not in taken)] = token
        name_of = {token: name for name, token in taken.items()}
        self._names = [
            TokenName(name=name_of[token], content=content)
            for token, content in enumerate(contents)
        ]

    def __getitem__(self, token: int) -> TokenName:
        """The name of a token."""
        return self._names[token]


def _decoder(tokenizer: Any) -> Callable[[list[list[int]]], list[str]]:
    """Token ids to texts, special tokens included; all at once where the tokenizer can."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda many: list(backend.decode_batch(many, skip_special_tokens=False))
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return lambda many: [tokenizer.decode(ids, **options) for ids in many]


def _texts(
    decode: Callable[[list[list[int]]], list[str]], tokens: range, special: set[int]
) -> list[str]:
    """What each token reads like behind a letter: alone, some lose the space they begin with."""
    alone = decode([[token] for token in tokens])
    letters = (
        token
        for token in tokens
        if len(alone[token]) == 1 and alone[token].isascii() and alone[token].isalpha()
    )
    letter = next((token for token in letters if token not in special), None)
    if letter is None:
        return alone
    behind = decode([[letter, token] for token in tokens])
    return [
        text.removeprefix(alone[letter]) if text.startswith(alone[letter]) else alone[token]
        for token, text in zip(tokens, behind, strict=True)
    ]


def _content(spelling: str, text: str, byte_of: dict[str, int]) -> bytes | None:
    """What a token adds to a text, by its spelling in the vocabulary where it has no text."""
    if _UNFINISHED not in text or text == spelling:
        return text.encode() or None
    byte = _BYTE.fullmatch(spelling)
    if byte:
        return bytes([int(byte[1], 16)])
    if all(letter in byte_of for letter in spelling):
        return bytes(byte_of[letter] for letter in spelling)
    return None


def _byte_alphabet() -> dict[str, int]:
    """Bytes by the letters of GPT-2's vocabulary: printable ones stand for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


def _is_byte(spelled: Sequence[str], token: int) -> bool:
    return token < len(spelled) and _BYTE.fullmatch(spelled[token]) is not None


def _candidates(token: int, content: bytes | None) -> list[str]:
    """Names that a token could have, the best first; the last is nobody else's."""
    names = []
    if content is not None:
        text = content.decode(errors="replace")
        if text.encode() == content and not text.startswith(("bytes:", "token_id:")):
            names.append(text)
        names.append("bytes:" + "".join(f"\\x{byte:02x}" for byte in content))
    return [*names, f"token_id:{token}"]
