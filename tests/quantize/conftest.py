"""Stand-ins for what takes seconds in a whole job, for files that ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_words import word_tokenizer
from torch import Tensor

import rotq.quantize.publish
import rotq.quantize.setup
from rotq.checkpoint.load import load_model


@pytest.fixture
def reloaded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last check without a fresh process, of which tests/checkpoint/test_reload.py is."""

    def check(folder: Path, ids_BT: Tensor, logits_BTV: Tensor, **_: Any) -> None:
        with torch.no_grad():
            assert torch.equal(load_model(folder)(ids_BT, use_cache=False).logits, logits_BTV)

    monkeypatch.setattr(rotq.quantize.publish, "check_reload", check)


@pytest.fixture
def numbered_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer of ``write_model``'s models without its file."""
    fast = word_tokenizer()
    monkeypatch.setattr(rotq.quantize.setup, "load_tokenizer", lambda *_, **__: fast)
