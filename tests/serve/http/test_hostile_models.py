"""A model's own code and files that hang, panic or raise cost one request, not the server."""

import threading
import time
from typing import Any

import pytest
from asking import chat, http, post, refused, wait_until
from odd_tokenizers import BACKTRACKS, HANGS, panicking_tokenizer, templated_tokenizer
from tiny_served import byte_tokenizer, running_server, served_model

from rotq.errors import RotqError
from rotq.serve.http import tokenization
from rotq.serve.run import build_server
from rotq.serve.settings import Settings

SMALL = {"prompt": "hello", "max_tokens": 1}


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_templates_that_hang_delay_no_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "_SECONDS", 3.0)
    with running_server(served_model(), templated_tokenizer(HANGS)) as server:
        server.served.service.tokenization.start()
        assert post(server, SMALL).is_success
        found: list[Any] = []

        def hang() -> None:
            found.append(chat(server, messages=messages("hang"), max_tokens=1))

        threads = [threading.Thread(target=hang) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        began = time.monotonic()
        assert post(server, SMALL).is_success
        assert time.monotonic() - began < 2.5
        for thread in threads:
            thread.join()
        for response in found:
            error = refused(response, 400, "took too long")
            assert error["code"] == "tokenizer_failed"
        assert chat(server, messages=messages("hello"), max_tokens=1).is_success
        assert ["took too long" in str(error) for error in server.errors] == [True, True]


def test_a_panic_of_the_tokenizer_is_an_error_in_openais_form() -> None:
    with running_server(served_model(), panicking_tokenizer()) as server:
        for _ in range(2):
            error = refused(post(server, {"prompt": BACKTRACKS}), 400, "PanicException")
            assert (error["param"], error["code"]) == ("prompt", "tokenizer_failed")
            assert post(server, SMALL).is_success
        chatted = chat(server, messages=messages(BACKTRACKS + "<"))
        assert chatted.headers["content-type"] == "application/json"
        assert http().get(server.url + "/health").is_success


class Panic(BaseException):
    """As those of native libraries, no Exception."""


def test_a_panic_in_reading_tokens_costs_one_sequence() -> None:
    tokenizer = byte_tokenizer()
    with running_server(served_model(), tokenizer) as server:
        decode = tokenizer.decode
        bad = tokenizer("~")["input_ids"][0]

        def failing(ids: Any, **options: Any) -> Any:
            if bad in list(ids):
                raise Panic("on this token")
            return decode(ids, **options)

        tokenizer.decode = failing
        beside: list[Any] = []
        body = {"prompt": "hello", "max_tokens": 300, "temperature": 0, "ignore_eos": True}
        thread = threading.Thread(target=lambda: beside.append(post(server, body)))
        thread.start()
        wait_until(lambda: server.served.engine.state().running == 1)
        error = refused(post(server, {"prompt": [5, bad], "max_tokens": 4}), 500)
        assert "on this token" not in error["message"]
        thread.join()
        assert beside[0].status_code in (200, 500)
        tokenizer.decode = decode
        assert post(server, SMALL).is_success
        assert server.served.engine.alive


def test_a_sequence_whose_text_fails_is_the_only_one_that_does() -> None:
    tokenizer = byte_tokenizer()
    with running_server(served_model(), tokenizer) as server:
        decode, failed = tokenizer.decode, threading.Event()
        body = {"prompt": "hello", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        wanted = post(server, body).json()["choices"][0]["text"]
        marked = byte_tokenizer()("zzzz")["input_ids"]

        def failing(ids: Any, **options: Any) -> Any:
            if len(ids) > 4 and list(ids)[:4] == marked:
                failed.set()
                raise Panic("here")
            return decode(ids, **options)

        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(post(server, body)))
        thread.start()
        wait_until(lambda: server.served.engine.state().running == 1)
        tokenizer.decode = failing
        assert post(server, {**body, "prompt": "zzzz"}).status_code == 500
        assert failed.is_set()
        thread.join()
        assert found[0].json()["choices"][0]["text"] == wanted


def test_tokens_that_the_model_lacks_are_refused_in_chats_too() -> None:
    """A tokenizer with added tokens beyond the rows of the embedding."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with running_server(served_model(), tokenizer) as server:
        refused(post(server, {"prompt": "a<new>"}), 400, "258")
        refused(chat(server, messages=messages("a<new>")), 400, "258")
        assert post(server, SMALL).is_success


def test_a_tokenizer_that_cannot_be_sent_is_refused_at_start() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.held = threading.Lock()
    with pytest.raises(RotqError, match="cannot be sent to another process"):
        build_server(served_model(), tokenizer, None, Settings(kv_memory=1 << 20), name="tiny")
