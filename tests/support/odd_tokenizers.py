"""Tokenizers and chat templates that real folders have, or could have, and that go wrong."""

from __future__ import annotations

from typing import Any

from tiny_served import byte_tokenizer
from tokenizers import Regex, pre_tokenizers

HANGS = (
    "{% if 'hang' in messages[0].content %}{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}{% endif %}"
    "{{ messages[0].content }}"
)
"""A template that does not come to an end on some texts."""

BACKTRACKS = "a" * 60 + "b"
"""A text that ``panicking_tokenizer`` gives up on."""


def panicking_tokenizer() -> Any:
    """Its regular expression gives up, and the native library panics."""
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    return tokenizer


def templated_tokenizer(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer
