"""What a model can be given: ids that its embedding has, no more tokens than it has positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rotq.errors import RotqError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of what one model reads; a field that is None bounds nothing."""

    embeddings: int | None = None
    """Token ids are below it."""
    positions: int | None = None
    """Most tokens of a window, special tokens included: rows of a table of positions."""

    def within(self, other: Limits) -> Limits:
        """Of both together, as of a model and the one it is compared with."""
        return Limits(
            embeddings=_least(self.embeddings, other.embeddings),
            positions=_least(self.positions, other.positions),
        )

    def cut(self, length: int, *, special: int = 0, least: int = 1) -> int:
        """As many tokens of a text as ``length`` and the positions allow.

        Args:
            length: Tokens that were asked for.
            special: Tokens that stand around them and take positions too.
            least: Fewer are of no use.

        Raises:
            RotqError: the positions do not suffice for ``least``.
        """
        if self.positions is None or length + special <= self.positions:
            return length
        room = self.positions - special
        if room < least:
            raise RotqError(f"the model's {self.positions} positions leave room for {room} tokens")
        return room

    def note(self, asked: int, given: int, what: str = "tokens", *, special: int = 0) -> str:
        """One line where windows were cut; empty where they were not."""
        if given == asked:
            return ""
        around = f", {special} of them for special tokens" if special else ""
        return (
            f"windows are cut from {asked} to {given} {what}: "
            f"the model has {self.positions} positions{around}"
        )

    def check(self, ids: Tensor, source: str = "") -> None:
        """Refuse a token that the model has no embedding for.

        Args:
            ids: int64, any shape, of what the model will be given.
            source: Of the text.

        Raises:
            RotqError: an id is too large; names it.
        """
        if self.embeddings is None or not ids.numel() or int(ids.max()) < self.embeddings:
            return
        where = f"text {source}: " if source else ""
        raise RotqError(
            f"{where}token id {int(ids.max())} is outside the model's {self.embeddings} "
            "embeddings; is the tokenizer the model's own?"
        )


def _least(first: int | None, second: int | None) -> int | None:
    found = [value for value in (first, second) if value is not None]
    return min(found) if found else None
