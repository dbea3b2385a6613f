"""Long texts are bounded before they are encoded, and keep no short one waiting."""

import asyncio
import threading
import time
from typing import Any

import pytest
from asking import chat, post, refused
from tiny_served import Running, byte_tokenizer, running_server, served_model

from rotq.serve.http import tokenization
from rotq.serve.http.encoder_process import EncoderProcess
from rotq.serve.http.lanes import Turns

SMALL = {"prompt": "hello", "max_tokens": 1}


def calls_of(server: Running, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How long the texts were that were encoded."""
    seen: list[int] = []
    call = EncoderProcess.call

    def watched(self: Any, name: str, seconds: float, **given: Any) -> Any:
        texts = given["messages"][0]["texts"] if name == "converse" else [given["text"]]
        seen.append(sum(map(len, texts)))
        return call(self, name, seconds, **given)

    monkeypatch.setattr(EncoderProcess, "call", watched)
    return seen


def test_what_cannot_fit_is_never_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(served_model(), byte_tokenizer()) as server:
        seen = calls_of(server, monkeypatch)
        long = "ab" * 1_000_000
        for prompt in (long, ["x", long]):
            error = refused(post(server, {"prompt": prompt}), 400, "2000000 characters", "640")
            assert error["code"] == "context_length_exceeded"
        for content in (long, [{"type": "text", "text": "ab" * 10_000}] * 100):
            message = {"role": "user", "content": content}
            error = refused(chat(server, messages=[message]), 400, "2000000 characters", "640")
            assert error["param"] == "messages"
        assert seen == [1]
        # what may fit is encoded, and counted
        refused(post(server, {"prompt": "x" * 40_000}), 400, "40000 tokens")
        assert seen == [1, 40_000]


def test_what_a_template_makes_too_long_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content * 99999 }}"
    with running_server(served_model(), tokenizer) as server:
        message = {"role": "user", "content": "hi"}
        error = refused(chat(server, messages=[message]), 400, "199998 characters")
        assert error["code"] == "context_length_exceeded"


def test_a_short_text_waits_for_no_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(served_model(), byte_tokenizer()) as server:
        server.served.service.tokenization.start()
        assert post(server, SMALL).is_success
        call, over = EncoderProcess.call, threading.Event()

        def slow(self: Any, name: str, seconds: float, **given: Any) -> Any:
            if len(given["text"]) > tokenization.SHORT:
                over.wait(20)
            return call(self, name, seconds, **given)

        monkeypatch.setattr(EncoderProcess, "call", slow)
        long = {"prompt": "x" * (tokenization.SHORT + 1)}
        threads = [threading.Thread(target=post, args=(server, long)) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert post(server, SMALL).is_success
        assert not over.is_set()
        over.set()
        for thread in threads:
            thread.join()


def test_waiting_for_an_encoder_is_bounded_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    call = EncoderProcess.call

    def slow(self: Any, name: str, seconds: float, **given: Any) -> Any:
        over.wait(20)
        return call(self, name, seconds, **given)

    with running_server(
        served_model(), byte_tokenizer(), max_queue=2, request_timeout=1.5
    ) as server:
        assert post(server, SMALL).is_success
        monkeypatch.setattr(EncoderProcess, "call", slow)
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda: found.append(post(server, SMALL).status_code))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [429, 429, 429, 504, 504, 504]
        over.set()
        monkeypatch.undo()
        assert post(server, SMALL).is_success


def test_clients_take_turns() -> None:
    async def scene() -> list[str]:
        turns, order = Turns(10), []

        async def ask(client: str, name: str) -> None:
            await turns.take(client)
            order.append(name)
            await asyncio.sleep(0)
            turns.give()

        await turns.take("first")
        tasks = [asyncio.create_task(ask("busy", f"busy {i}")) for i in range(3)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(ask("other", "other")))
        await asyncio.sleep(0)
        assert not turns.full
        turns.give()
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(scene()) == ["busy 0", "other", "busy 1", "busy 2"]


def test_a_turn_of_somebody_who_left_goes_on() -> None:
    async def scene() -> bool:
        turns = Turns(1)
        await turns.take("first")
        leaving = asyncio.create_task(turns.take("second"))
        await asyncio.sleep(0)
        assert turns.full
        # it is given the turn, and leaves before it knows
        turns.give()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        left = asyncio.create_task(turns.take("third"))
        await asyncio.wait_for(left, 1)
        waiting = asyncio.create_task(turns.take("fourth"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        turns.give()
        await asyncio.wait_for(turns.take("fifth"), 1)
        return True

    assert asyncio.run(scene())
