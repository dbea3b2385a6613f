"""HTTP: what right requests are answered."""

from typing import Any

import pytest
import torch
import transformers
from asking import chat, events, http, post, refused
from tiny_served import Running, byte_tokenizer, protein_tokenizer, running_server, served_model


def test_a_completion(server: Running) -> None:
    found = post(server, {"prompt": "Hello", "max_tokens": 7, "temperature": 0}).json()
    assert found["object"] == "text_completion"
    assert found["model"] == "tiny"
    assert found["choices"][0]["finish_reason"] in ("length", "stop")
    assert found["usage"]["prompt_tokens"] == 5
    assert found["usage"]["total_tokens"] == 5 + found["usage"]["completion_tokens"]


def test_a_stream_is_the_answer_in_parts(server: Running) -> None:
    body = {"prompt": ["One", "Two"], "max_tokens": 20, "temperature": 0, "n": 2, "seed": 1}
    whole = post(server, body).json()
    parts = events(server, {**body, "stream_options": {"include_usage": True}})
    for index, choice in enumerate(whole["choices"]):
        mine = [part["choices"][0] for part in parts if part["choices"]]
        mine = [part for part in mine if part["index"] == index]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["prompt_tokens"] == 6
    assert parts[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len({part["id"] for part in parts}) == 1


def test_token_ids_are_prompts_too(server: Running) -> None:
    ids = byte_tokenizer()("Hello")["input_ids"]
    greedy = {"max_tokens": 6, "temperature": 0}
    text = post(server, {"prompt": "Hello", **greedy}).json()["choices"][0]["text"]
    assert post(server, {"prompt": ids, **greedy}).json()["choices"][0]["text"] == text
    two = post(server, {"prompt": [ids, ids], **greedy}).json()["choices"]
    assert [choice["text"] for choice in two] == [text, text]
    refused(post(server, {"prompt": [5, 258]}), 400, "258")
    refused(post(server, {"prompt": [5, -1]}), 400)


def test_echo_scores_the_prompt(server: Running) -> None:
    body = {"prompt": "H\u00e9llo", "max_tokens": 0, "echo": True, "logprobs": 2}
    found = post(server, body).json()["choices"][0]
    assert found["text"] == "H\u00e9llo"
    logprobs = found["logprobs"]
    assert len(logprobs["tokens"]) == 6
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"][:2] == [0, 1]
    assert found["finish_reason"] == "length"
    longer = post(server, {**body, "max_tokens": 2, "ignore_eos": True}).json()["choices"][0]
    assert longer["text"].startswith("H\u00e9llo")
    assert longer["logprobs"]["text_offset"][6] == 5


def test_echo_in_a_stream(server: Running) -> None:
    parts = events(server, {"prompt": "Hi", "max_tokens": 3, "echo": True, "temperature": 0})
    assert parts[0]["choices"][0]["text"] == "Hi"


def test_a_chat(server: Running) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    body = {"messages": messages, "max_completion_tokens": 5, "temperature": 0}
    found = chat(server, **body).json()
    assert found["object"] == "chat.completion"
    assert found["choices"][0]["message"]["role"] == "assistant"
    rendered = "<system>Be short.\n<user>ab\n<assistant>"
    assert found["usage"]["prompt_tokens"] == len(rendered)
    same = post(server, {"prompt": rendered, "max_tokens": 5, "temperature": 0}).json()
    assert found["choices"][0]["message"]["content"] == same["choices"][0]["text"]
    parts = events(server, body, "/v1/chat/completions")
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == same["choices"][0]["text"]


def test_a_chat_without_a_limit_gets_the_default() -> None:
    with running_server(served_model(), byte_tokenizer(), default_max_tokens=9) as server:
        body = {"messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
        assert chat(server, **body).json()["usage"]["completion_tokens"] == 9


def test_chat_logprobs(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True}
    found = chat(server, **body, logprobs=True, top_logprobs=3).json()["choices"][0]
    content = found["logprobs"]["content"]
    assert len(content) == 4
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    told = b"".join(bytes(entry["bytes"]) for entry in content)
    assert told.decode(errors="replace") == found["message"]["content"]
    refused(chat(server, **body, top_logprobs=3), 400, "logprobs")


def test_seeds_repeat(server: Running) -> None:
    def text(seed: int) -> str:
        body = {"prompt": "x", "max_tokens": 12, "seed": seed}
        return str(post(server, body).json()["choices"][0]["text"])

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_stop_strings(server: Running) -> None:
    body = {"prompt": "Hello", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    text = post(server, body).json()["choices"][0]["text"]
    stop = text[8:10]
    found = post(server, {**body, "stop": stop}).json()["choices"][0]
    assert found["text"] == text[: text.index(stop)]
    assert found["finish_reason"] == "stop"
    streamed = events(server, {**body, "stop": [stop, "never"]})
    assert "".join(part["choices"][0]["text"] for part in streamed) == found["text"]


def test_models_health_and_numbers(server: Running) -> None:
    assert [item["id"] for item in http().get(server.url + "/v1/models").json()["data"]] == ["tiny"]
    assert http().get(server.url + "/v1/models/tiny").json()["object"] == "model"
    assert http().get(server.url + "/health").json() == {"status": "ok"}
    post(server, {"prompt": "Hello", "max_tokens": 3, "ignore_eos": True})
    text = http().get(server.url + "/metrics").text
    for name in (
        "rotq_generated_tokens_total",
        "rotq_time_to_first_token_seconds_count",
        "rotq_inter_token_seconds_bucket",
        "rotq_cache_bytes_total",
        'rotq_http_responses_total{route="/v1/completions",status="200"}',
    ):
        assert name in text
    stats = http().get(server.url + "/stats").json()
    assert stats["cache_bytes_total"] <= 8 << 20
    assert stats["kv"] == "k3v3-oblivious"
    assert stats["calibrated"] is False


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_proteins(name: str) -> None:
    """Amino acids in, amino acids out, by the same endpoint; no chat template, so no chat."""
    model = served_model(vocab=24) if name == "llama" else _protgpt2()
    with running_server(model, protein_tokenizer()) as server:
        body = {
            "prompt": "MKTAYIAKQR",
            "max_tokens": 40,
            "n": 3,
            "seed": 5,
            "top_k": 20,
            "ignore_eos": True,
        }
        found = post(server, body).json()
        assert found["usage"]["prompt_tokens"] == 10
        for choice in found["choices"]:
            assert set(choice["text"]) <= set("ACDEFGHIKLMNPQRSTVWY")
        assert len({choice["text"] for choice in found["choices"]}) == 3
        scored = post(
            server, {"prompt": "MKTAYIAKQR", "max_tokens": 0, "echo": True, "logprobs": 1}
        )
        logprobs = scored.json()["choices"][0]["logprobs"]
        assert "".join(logprobs["tokens"]) == "MKTAYIAKQR"
        refused(chat(server, messages=[{"role": "user", "content": "hi"}]), 400, "/v1/completions")


def _protgpt2() -> Any:
    """Learned positions instead of RoPE, as ProtGPT2 has them."""
    config = transformers.GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=80)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
