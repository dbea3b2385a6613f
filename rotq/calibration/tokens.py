"""A tokenizer's ids of a whole text, whatever else its files ask for.

What ``tokenizer.json`` may carry and would act without a word is lifted for a call, and put back:

    truncation, padding     are of the batches of whoever saved the file
    dropout                 of BPE merges: other ids at every call
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rotq.errors import RotqError, is_panic, told

_STDERR = 2


def encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text, from its first character to its last.

    Args:
        tokenizer: Of transformers. Its settings change for the call: one thread at a time.
        text: Of any length.
        special: Add the special tokens that the tokenizer puts around a text.

    Raises:
        RotqError: the tokenizer fails, or its native code panics, as where a regular expression
            gives up; names the tokenizer.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    with told(f"the tokenizer of {name} fails"):
        ids = _encode(tokenizer, text, special)
    return ids


def beginning(tokenizer: Any, choice: str = "auto") -> tuple[int, ...]:
    """Special tokens that a window of text begins with, as the model's own training text did.

    Args:
        choice: "auto" is what the tokenizer puts before a text, "yes" its BOS in any case, "no"
            nothing.

    Raises:
        RotqError: "yes", and the tokenizer has no BOS; or it fails.
    """
    if choice == "no":
        return ()
    if choice == "yes":
        if tokenizer.bos_token_id is None:
            raise RotqError(f"bos=yes: {type(tokenizer).__name__} has no BOS token")
        return (int(tokenizer.bos_token_id),)
    plain, whole = (encode(tokenizer, "a", special=special) for special in (False, True))
    places = [n for n in range(len(whole)) if whole[n : n + len(plain)] == plain]
    return tuple(whole[: places[0]]) if plain and places else ()


@contextmanager
def panics_unprinted() -> Iterator[None]:
    """Hold back the report that native code writes to stderr before a panic becomes an exception.

    For programs whose stderr is for people and that have one thread. What else is written there
    meanwhile follows at the end.
    """
    try:
        kept = os.dup(_STDERR)
    except OSError:  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), _STDERR)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = is_panic(error.__cause__ or error)
            raise
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
            if not panicked:
                held.seek(0)
                os.write(_STDERR, held.read())


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    if not getattr(tokenizer, "is_fast", False):
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    # no offsets: half the time and memory, which a text of some MB makes count
    backend = tokenizer.backend_tokenizer
    with _lifted(backend):
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
    return ids


@contextmanager
def _lifted(backend: Any) -> Iterator[None]:
    """Nothing but the vocabulary and its rules decides the ids of a text."""
    truncation, padding = backend.truncation, backend.padding
    model = backend.model
    dropout = getattr(model, "dropout", None)
    backend.no_truncation()
    backend.no_padding()
    if dropout is not None:
        model.dropout = None
    try:
        yield
    finally:
        if dropout is not None:
            model.dropout = dropout
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
