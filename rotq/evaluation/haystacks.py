"""Prompts in which something is said once, far back, and asked for at the end.

    passkey   five digits
    needle    a word of a person's, among sentences about others; asked for by the person

Shape suffixes: N tokens of the text, T positions, A tokens of an answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotq.calibration.tokens import encode
from rotq.errors import RotqError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in the haystack, 0 its start."""

_NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")
_WORDS = ("apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer")
_OTHERS = 3
"""Sentences of other people in the haystack of a needle."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A haystack with its question, and the answer."""

    depth: float
    ids_T: Tensor
    """The answer at its end."""
    answer_A: Tensor


def make_prompts(
    task: str, tokenizer: Any, ids_N: Tensor, *, seq_len: int, number: int, seed: int = 0
) -> list[Prompt]:
    """So many prompts at each depth, each of ``seq_len`` tokens, the answer counted.

    Args:
        task: ``passkey`` or ``needle``.
        tokenizer: Of the model.
        ids_N: Tokens of the text that haystacks are cut from.
        seq_len: T.
        number: Prompts at each depth.
        seed: Of what is said, and of where haystacks begin.

    Raises:
        RotqError: no haystack is left of ``seq_len`` tokens, or the text is shorter than one.
    """
    draw = random.Random(seed)
    prompts = []
    for depth in DEPTHS:
        for _ in range(number):
            said, question, answer = _passkey(draw) if task == "passkey" else _needle(draw)
            parts = [encode(tokenizer, f"\n{line}\n") for line in said]
            asked, answer_ids = encode(tokenizer, f"\n{question}"), encode(tokenizer, answer)
            room = seq_len - sum(map(len, parts)) - len(asked) - len(answer_ids)
            if not 0 < room < len(ids_N):
                raise RotqError(
                    f"{task}: {seq_len} tokens leave {room} for the haystack, the text has "
                    f"{len(ids_N)}"
                )
            start = draw.randrange(len(ids_N) - room)
            hay = ids_N[start : start + room].tolist()
            ids = [*_hidden(hay, parts, depth, draw), *asked, *answer_ids]
            ids_T, answer_A = torch.tensor(ids), torch.tensor(answer_ids)
            prompts.append(Prompt(depth=depth, ids_T=ids_T, answer_A=answer_A))
    return prompts


def _passkey(draw: random.Random) -> tuple[list[str], str, str]:
    key = "".join(draw.choices("0123456789", k=5))
    said = f"The pass key is {key}. Remember it. {key} is the pass key."
    return [said], "What is the pass key? The pass key is", f" {key}"


def _needle(draw: random.Random) -> tuple[list[str], str, str]:
    names = draw.sample(_NAMES, 1 + _OTHERS)
    words = draw.sample(_WORDS, 1 + _OTHERS)
    said = [f"The secret word of {n} is {w}." for n, w in zip(names, words, strict=True)]
    return said, f"The secret word of {names[0]} is", f" {words[0]}"


def _hidden(
    hay: list[int], parts: Sequence[list[int]], depth: float, draw: random.Random
) -> list[int]:
    """The first part at a depth, the others anywhere else."""
    places = [(int(depth * len(hay)), parts[0])]
    places += [(draw.randrange(len(hay)), part) for part in parts[1:]]
    for place, part in sorted(places, key=lambda entry: -entry[0]):
        hay = [*hay[:place], *part, *hay[place:]]
    return hay
