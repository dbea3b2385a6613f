"""vLLM's server on packed weights and a packed cache, by the ``openai`` client."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tiny_families import byte_tokenizer
from vllm_engines import engine

KV = {"additional_config": {"rotq_kv": "k3v3"}, "block_size": 64}
TEXT = "The quick brown fox jumps over the lazy dog. " * 3
READY = 400.0
"""Seconds."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    path = checkpoint(3, family="llama-bytes")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(model: Path) -> Any:
    """Greedy tokens and log probabilities of an engine in this process."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=16, logprobs=1, ignore_eos=True)
    with engine(model, skip_tokenizer_init=False, **KV) as llm:
        answer = llm.generate([TEXT], asked, use_tqdm=False)[0].outputs[0]
        chat = llm.chat([{"role": "user", "content": TEXT}], asked, use_tqdm=False)[0].outputs[0]
    log_p = [each[t].logprob for t, each in zip(answer.token_ids, answer.logprobs, strict=True)]
    return answer.text, log_p, chat.text


@pytest.fixture(scope="module")
def client(model: Path, expected: Any) -> Iterator[openai.OpenAI]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny", "--port", str(port), "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--max-model-len", "1200", "--max-num-seqs", "8"]
    command += ["--enforce-eager", "--block-size", "64"]
    command += ["--additional-config", '{"rotq_kv": "k3v3"}']
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    process = subprocess.Popen(command, env=environment)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        wait_for(client, process)
        yield client
    finally:
        process.terminate()
        process.wait(60)


def wait_for(client: openai.OpenAI, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + READY
    while time.monotonic() < end:
        assert process.poll() is None, "the server has ended"
        try:
            client.models.list()
        except openai.APIConnectionError:
            time.sleep(1)
        else:
            return
    raise AssertionError("the server is not ready")


GREEDY: dict[str, Any] = {
    "model": "tiny",
    "temperature": 0,
    "max_tokens": 16,
    "extra_body": {"ignore_eos": True},
}


def test_completions_with_log_probabilities(client: openai.OpenAI, expected: Any) -> None:
    text, log_p, _ = expected
    for _ in range(2):
        choice = client.completions.create(prompt=TEXT, logprobs=1, **GREEDY).choices[0]
        assert choice.text == text
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == pytest.approx(log_p, abs=1e-4)


def test_a_streamed_chat(client: openai.OpenAI, expected: Any) -> None:
    stream = client.chat.completions.create(
        messages=[{"role": "user", "content": TEXT}], stream=True, **GREEDY
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(parts) == expected[2]


def test_several_answers_and_stop(client: openai.OpenAI, expected: Any) -> None:
    text = expected[0]
    answer = client.completions.create(prompt=TEXT, n=3, **{**GREEDY, "temperature": 1e-6})
    assert [choice.text for choice in answer.choices] == [text] * 3
    stop = text[6:8]
    choice = client.completions.create(prompt=TEXT, stop=[stop], **GREEDY).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
