"""HTTP: what is not as it must be is answered in OpenAI's form, and the server lives."""

from collections.abc import Iterator
from typing import Any

import pytest
from asking import JSON, chat, http, post, refused, wait_until
from tiny_served import Running, byte_tokenizer, running_server, served_model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, ["prompt"]),
        ({"prompt": []}, ["prompt"]),
        ({"prompt": {"a": 1}}, ["prompt"]),
        ({"prompt": "\ud800"}, ["surrogates"]),
        ({"prompt": ""}, ["no token"]),
        ({"max_tokens": "7"}, ["max_tokens", "integer"]),
        ({"max_tokens": -1}, ["max_tokens"]),
        ({"max_tokens": 10**40}, ["max_tokens"]),
        ({"max_tokens": 1.5}, ["max_tokens"]),
        ({"max_tokens": 641}, ["641"]),
        ({"temperature": "hot"}, ["temperature"]),
        ({"temperature": float("nan")}, ["temperature"]),
        ({"temperature": 2.1}, ["temperature"]),
        ({"top_p": 0}, ["top_p"]),
        ({"n": 0}, ["n:"]),
        ({"n": 1000}, ["n:"]),
        ({"stop": ["a", "b", "c", "d", "e"]}, ["stop"]),
        ({"stop": ""}, ["stop"]),
        ({"stream": "yes"}, ["stream"]),
        ({"stream_options": {"include_usage": True}}, ["stream: true"]),
        ({"presence_penalty": 0.5}, ["presence_penalty"]),
        ({"logit_bias": {"5": 100}}, ["logit_bias"]),
        ({"suffix": "end"}, ["suffix"]),
        ({"best_of": 3}, ["best_of"]),
        ({"grammar": "x"}, ["grammar", "not supported"]),
        ({"logprobs": 21}, ["logprobs"]),
        ({"seed": 2**64}, ["seed"]),
    ],
    ids=str,
)
def test_wrong_requests(server: Running, change: dict[str, Any], words: list[str]) -> None:
    error = refused(post(server, {"prompt": "x", "max_tokens": 2, **change}), 400, *words)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "robot", "content": "hi"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": "\udfff"}]},
        {"messages": [{"role": "developer", "content": "hi"}]},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"max_completion_tokens": 0},
    ],
    ids=str,
)
def test_wrong_chats(server: Running, change: dict[str, Any]) -> None:
    refused(chat(server, **{"messages": [{"role": "user", "content": "hi"}], **change}), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'"x"',
        b"[" * 50_000,
        b'{"model":' + b"9" * 9000 + b"}",
    ],
    ids=["empty", "cut", "utf8", "list", "null", "string", "deep", "digits"],
)
def test_bodies_that_are_no_request(server: Running, body: bytes) -> None:
    refused(post(server, body), 400)


def test_unknown_things(server: Running) -> None:
    error = refused(post(server, {"prompt": "x", "model": "gpt"}), 404, "gpt", "tiny")
    assert error["code"] == "model_not_found"
    refused(http().get(server.url + "/v1/models/other/one"), 404)
    refused(http().get(server.url + "/v2/x"), 404)
    refused(http().get(server.url + "/v1/completions"), 405)
    refused(post(server, {"prompt": "x"}, **{"content-type": "text/plain"}), 400)


def test_a_prompt_that_is_too_long(server: Running) -> None:
    error = refused(post(server, {"prompt": "x" * 5000}), 400, "5000", "640")
    assert error["code"] == "context_length_exceeded"
    # litellm, for one, knows the case by OpenAI's words alone
    far = refused(post(server, {"prompt": "x" * 190_000}), 400, "190000 characters")
    for message in (error["message"], far["message"]):
        assert message.startswith("This model's maximum context length is 640 tokens")


def test_a_body_that_is_too_large(server: Running) -> None:
    refused(post(server, {"prompt": "x" * 300_000}), 413)

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 10_000

    response = http().post(server.url + "/v1/completions", content=chunks(), headers=JSON)
    refused(response, 413)


def test_failures_inside_stay_inside() -> None:
    with running_server(served_model(), byte_tokenizer()) as server:
        model = server.served.engine.runner.model
        forward = model.forward

        def failing(*_: Any, **__: Any) -> Any:
            model.forward = forward
            raise RuntimeError("secret detail")

        model.forward = failing
        error = refused(post(server, {"prompt": "x"}), 500)
        assert "secret" not in error["message"]
        assert post(server, {"prompt": "x"}).is_success
        server.served.service.complete = failing  # type: ignore[method-assign]
        assert "secret" not in refused(post(server, {"prompt": "x"}), 500)["message"]
        wait_until(lambda: len(server.errors) > 1)
        assert [type(error) for error in server.errors] == [RuntimeError, RuntimeError]
        server.errors.clear()


def test_a_draining_server_takes_nothing_new() -> None:
    with running_server(served_model(), byte_tokenizer()) as server:
        server.served.service.draining = True
        assert refused(post(server, {"prompt": "x"}), 503)["code"] == "shutting_down"
        assert refused(http().get(server.url + "/health"), 503)["code"] == "draining"
        assert http().get(server.url + "/stats").json()["draining"] is True


def test_a_dead_engine_is_said() -> None:
    with running_server(served_model(), byte_tokenizer()) as server:
        server.served.engine.close()
        refused(post(server, {"prompt": "x"}), 503)
        assert refused(http().get(server.url + "/health"), 503)["code"] == "dead"


def test_tokens_that_have_no_embedding() -> None:
    """Whatever the configuration says of the vocabulary."""
    model = served_model()
    number = model.get_input_embeddings().num_embeddings
    model.config.vocab_size = 10**6
    with running_server(model, byte_tokenizer()) as server:
        wrong = {"prompt": [number], "max_tokens": 2}
        refused(post(server, wrong), 400, f"token {number} is not among the model's {number}")
        assert post(server, {"prompt": [number - 1], "max_tokens": 2}).status_code == 200
