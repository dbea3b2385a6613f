"""Where tokens of a prompt are, in the text that an answer repeats."""

from collections.abc import Iterator
from typing import Any

import pytest
from asking import events, post
from tiny_served import Running, byte_tokenizer, running_server, served_model
from tokenizers import processors

PEPPER = "a\U0001f336b"


def with_special_tokens() -> Any:
    """<pad> before each text and <end> behind it."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <end>", special_tokens=[("<pad>", 0), ("<end>", 1)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def server(one_thread: None) -> Iterator[Running]:
    with running_server(served_model(), with_special_tokens()) as running:
        yield running
        assert running.errors == []


def scored(server: Running, prompt: Any, **change: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1, **change}
    found: dict[str, Any] = post(server, body).json()["choices"][0]
    return found


def begins(choice: dict[str, Any]) -> list[tuple[str, int]]:
    told = choice["logprobs"]
    return list(zip(told["tokens"], told["text_offset"], strict=True))


def test_offsets_are_in_the_users_text(server: Running) -> None:
    found = scored(server, "hello")
    assert found["text"] == "hello"
    letters = [(letter, place) for place, letter in enumerate("hello")]
    assert begins(found) == [("<pad>", 0), *letters, ("<end>", 5)]


def test_special_tokens_that_the_user_wrote_have_a_length(server: Running) -> None:
    found = scored(server, "a<end>b")
    assert found["text"] == "a<end>b"
    assert begins(found) == [("<pad>", 0), ("a", 0), ("<end>", 1), ("b", 6), ("<end>", 7)]


def test_characters_of_several_tokens_begin_together(server: Running) -> None:
    found = scored(server, PEPPER)
    assert found["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 1, 2, 3]


def test_special_tokens_among_ids_are_nowhere_in_the_text(server: Running) -> None:
    ids = byte_tokenizer()("hi\u00e9")["input_ids"]
    found = scored(server, [0, *ids[:1], 1, *ids[1:], 1])
    assert found["text"] == "hi\u00e9"
    assert found["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 2, 3]
    assert scored(server, [0, 1])["text"] == ""


def test_what_is_generated_begins_behind_the_echo(server: Running) -> None:
    for prompt in ("hello", byte_tokenizer()("hello")["input_ids"]):
        found = scored(server, prompt, max_tokens=3, temperature=0, ignore_eos=True)
        fresh = found["logprobs"]["text_offset"][-3:]
        assert fresh[0] == 5
        assert fresh == sorted(fresh)


@pytest.mark.parametrize("logprobs", [None, 1])
def test_an_echo_ends_before_an_unfinished_character(server: Running, logprobs: int | None) -> None:
    """Whatever the model adds, the whole reads as all the tokens do."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(PEPPER)["input_ids"]
    body = {"max_tokens": 3, "temperature": 0, "ignore_eos": True, "logprobs": logprobs}
    for end in range(1, len(ids)):
        asked = {"prompt": ids[:end], "echo": True, **body}
        found = post(server, asked).json()["choices"][0]
        again = post(server, {**asked, "echo": False, "logprobs": 1}).json()["choices"][0]
        told = again["logprobs"]["tokens"]
        fresh = b"".join(
            bytes([int(name[-2:], 16)]) if name.startswith("bytes:") else name.encode()
            for name in told
        )
        assert found["text"] == (PEPPER.encode()[:end] + fresh).decode(errors="replace")
        parts = events(server, asked)
        assert "".join(part["choices"][0]["text"] for part in parts) == found["text"]
    assert scored(server, ids[:3])["text"] == "a\ufffd"
