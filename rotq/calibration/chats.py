"""Conversations as a model's own template writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PROBE = "probe7inq"
"""Text to look for in what a template makes of a message."""

Content = str | list[dict[str, str]]


class ChatTemplate:
    """The template of a tokenizer, given text in the form that it reads.

    Args:
        tokenizer: Of transformers, with a ``chat_template``.
        generation: End with what the model's answer begins with.
    """

    def __init__(self, tokenizer: Any, *, generation: bool) -> None:
        self._tokenizer, self._generation = tokenizer, generation
        self._parts: dict[str, bool] = {}

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """What the template makes of messages; raises what it raises."""
        text: str = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=self._generation
        )
        return text

    def content(self, role: str, texts: Sequence[str]) -> Content:
        """Texts as the template takes them of a role: as one string, or as a list of parts."""
        return _content(self._wants_parts(role), texts)

    def fitted(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message of somebody's file with its text in that form; anything else is as it was."""
        given = message.get("content")
        texts = [given] if isinstance(given, str) else _texts(given)
        if texts is None:
            return message
        return {**message, "content": self.content(message["role"], texts)}

    def _wants_parts(self, role: str) -> bool:
        """Whether the template goes through the parts of a message, found by trying it.

        One that does loses a string without a word. Where neither shows, as for roles that it
        refuses or leaves out, it is as for the user.
        """
        if role not in self._parts:
            shown = next((parts for parts in (False, True) if self._shows(role, parts)), None)
            other = role != "user" and self._wants_parts("user")
            self._parts[role] = other if shown is None else shown
        return self._parts[role]

    def _shows(self, role: str, parts: bool) -> bool:
        probe = {"role": role, "content": _content(parts, [_PROBE])}
        if role == "user":
            messages = [probe]
        else:
            user = {"role": "user", "content": self.content("user", ["x"])}
            messages = [user, probe, user] if role == "assistant" else [probe, user]
        try:
            return _PROBE in self.render(messages)
        except Exception:
            return False


def _content(parts: bool, texts: Sequence[str]) -> Content:
    return [{"type": "text", "text": text} for text in texts] if parts else "".join(texts)


def _texts(content: Any) -> list[str] | None:
    """The texts of a list of parts; None where it is none, or holds something else than text."""
    if not isinstance(content, list) or not content:
        return None
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return texts
