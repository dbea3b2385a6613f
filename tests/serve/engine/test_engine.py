"""The engine: the same bits in company as alone, and every sequence ends as it should."""

import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_served import Listener, calibration_of, generation, running_engine, served_model
from transformers import DynamicCache

from rotq.errors import RotqError
from rotq.kv.cache.packed_cache import PackedCache
from rotq.serve.engine.engine import Engine
from rotq.serve.engine.sampling import Picked, Sampling

CASES = [
    ("llama", "k3v3", torch.float32, 64),
    ("llama", "k3v3", torch.float32, 128),
    ("llama", "dense", torch.float32, 64),
    ("llama", "dense", torch.float32, 128),
    ("llama", "k3v3", torch.bfloat16, 64),
    ("qwen3", "k4v2", torch.float32, 64),
    ("gemma3", "k3v3", torch.float32, 128),
    ("mixtral", "k3v3", torch.float32, 64),
]
Work = list[tuple[list[int], int]]
Told = tuple[str | None, tuple[Picked, ...]]


def mixed_work(number: int, *, seed: int = 0) -> Work:
    """Prompts of 1 to 230 tokens, some with the same beginnings, and answers of mixed lengths."""
    drawn = random.Random(seed)
    base = [drawn.randrange(2, 258) for _ in range(200)]
    return [
        (
            base[: drawn.choice([0, 0, 70, 132, 200])]
            + [drawn.randrange(2, 258) for _ in range(drawn.randrange(1, 30))],
            drawn.randrange(1, 18),
        )
        for _ in range(number)
    ]


def told(listener: Listener) -> Told:
    """How a sequence ended, and its tokens with their log probabilities, bit for bit."""
    last = listener.wait()
    return last.finish, tuple(item for event in listener.events for item in event.piece.picked)


def one_by_one(engine: Engine, work: Work) -> list[Told]:
    found = []
    for prompt, length in work:
        listener = Listener()
        assert engine.submit([generation(prompt, length, listener)])
        found.append(told(listener))
    return found


def together(engine: Engine, work: Work, order: Sequence[int] | None = None) -> list[Told]:
    listeners = [Listener() for _ in work]
    for index in order or range(len(work)):
        prompt, length = work[index]
        assert engine.submit([generation(prompt, length, listeners[index])])
    return [told(listener) for listener in listeners]


def alone(model: Any, kv: str, work: Work, chunk: int) -> list[Told]:
    """Each in an engine of its own: nothing to share, nobody beside it."""
    found = []
    for item in work:
        with running_engine(model, kv, prefill_chunk=chunk) as engine:
            found += one_by_one(engine, [item])
    return found


@pytest.mark.parametrize(("family", "kv", "dtype", "chunk"), CASES)
def test_company_changes_nothing(family: str, kv: str, dtype: torch.dtype, chunk: int) -> None:
    """Mixed lengths, admission and retirement all the time, prompts that share pages."""
    model, work = served_model(family, dtype=dtype), mixed_work(14)
    wanted = alone(model, kv, work, chunk)
    with running_engine(model, kv, prefill_chunk=chunk) as engine:
        assert together(engine, work) == wanted
        assert engine.state().reused > 0
        # once more, with everything to be found, in another order
        order = random.Random(1).sample(range(len(work)), len(work))
        assert together(engine, work, order) == wanted
        assert engine.runner.rows == (1 if family == "mixtral" else 6)


@pytest.mark.parametrize(("kv", "length"), [("dense", 200), ("k3v3", 60)])
def test_tokens_are_those_of_generate(kv: str, length: int) -> None:
    """transformers' loop, with a dense cache and with ``PackedCache`` (a prompt of one pass)."""
    model = served_model()
    calibration = calibration_of(model, kv)
    prompt = [2 + 7 * i % 256 for i in range(length)]
    cache = (
        DynamicCache(config=model.config)
        if calibration is None
        else PackedCache(model, calibration)
    )
    wanted = model.generate(
        torch.tensor([prompt]),
        past_key_values=cache,
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
    )[0, length:].tolist()
    with running_engine(model, kv) as engine:
        _, picked = one_by_one(engine, [(prompt, 30)])[0]
    assert [item.token for item in picked] == wanted


def test_company_changes_nothing_while_pages_are_short() -> None:
    """A pool of a few pages: sequences wait for each other, kept pages are overwritten."""
    model, work = served_model(), mixed_work(14, seed=3)
    wanted = alone(model, "k3v3", work, 64)
    with running_engine(model, "k3v3", kv_memory=80_000) as engine:
        assert engine.allocator.pages.size < 10
        assert together(engine, work) == wanted
        assert engine.allocator.pages.available == engine.allocator.pages.size


def test_seeds_do_not_feel_company() -> None:
    model = served_model()
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=11, logprobs=0)

    def run(engine: Engine, others: int) -> list[Told]:
        listener = Listener()
        rest = [Listener() for _ in range(others)]
        for index, other in enumerate(rest):
            engine.submit([generation([9, index + 2], 12, other)])
        engine.submit([generation([5, 6, 7], 12, listener, sampling=sampling)])
        return [told(listener), *map(told, rest)]

    with running_engine(model) as engine:
        assert run(engine, 0)[0] == run(engine, 9)[0]


def test_equal_prompts_are_computed_once() -> None:
    prompt = mixed_work(1)[0][0][:1] * 199
    with running_engine(served_model()) as engine:
        results = together(engine, [(prompt, 3)] * 5)
        assert len(set(results)) == 1
        # 4 sinks and 3 whole pages, then what is left of it five times
        assert engine.state().prompted == 196 + 5 * (199 - 196)
        assert engine.state().reused == 4 * 196


def test_prompts_share_whole_chunks() -> None:
    prompt = mixed_work(1)[0][0][:1] * 199
    with running_engine(served_model(), prefill_chunk=128) as engine:
        results = together(engine, [(prompt, 3)] * 3)
        assert len(set(results)) == 1
        # 4 sinks and a chunk of two pages; the third page is in a chunk that nobody fills
        assert engine.state().prompted == 132 + 3 * (199 - 132)
        assert engine.state().reused == 2 * 132


def test_a_full_queue_refuses_and_says_when() -> None:
    with running_engine(served_model(), max_batch=1, max_queue=2) as engine:
        listeners = [Listener() for _ in range(40)]
        taken = [engine.submit([generation([2], 200, listener)]) for listener in listeners]
        assert not all(taken)
        assert sum(taken) >= 3 - 1
        assert 1 <= engine.retry_after() <= 60
        for listener, ok in zip(listeners, taken, strict=True):
            assert not ok or listener.wait().finish == "length"


def test_a_cancelled_sequence_frees_its_pages() -> None:
    with running_engine(served_model(), max_queue=8) as engine:
        listener, started = Listener(), threading.Event()
        sequence = generation([2] * 100, 500, lambda event: (listener(event), started.set())[0])
        waiting = generation([2] * 10, 500, listener_of := Listener())
        waiting.cancelled = True
        engine.submit([sequence])
        engine.submit([waiting])
        assert started.wait(30)
        sequence.cancelled = True
        assert listener.wait().failure == "cancelled"
        assert listener_of.wait().failure == "cancelled"
        assert len(listener.events) < 500
        assert engine.allocator.pages.available == engine.allocator.pages.size


def test_a_late_sequence_ends() -> None:
    with running_engine(served_model(), max_batch=1) as engine:
        running, waiting = Listener(), Listener()
        late = time.monotonic() + 0.1
        engine.submit([generation([2], 600, running, deadline=late)])
        engine.submit([generation([2], 600, waiting, deadline=late)])
        assert running.wait().failure == "timeout"
        assert waiting.wait().failure == "timeout"
        assert engine.idle()


def test_closing_ends_everybody() -> None:
    listeners = [Listener() for _ in range(5)]
    with running_engine(served_model(), max_batch=2) as engine:
        for listener in listeners:
            engine.submit([generation([2], 600, listener)])
    assert {listener.wait().failure for listener in listeners} == {"shutdown"}
    assert not engine.submit([generation([2], 1, Listener())])


def test_a_failed_pass_fails_who_ran_and_serves_who_comes() -> None:
    model = served_model()
    with running_engine(model) as engine:
        wanted = one_by_one(engine, [([5, 6], 8)])
        forward = model.forward

        def failing(*args: Any, **kwargs: Any) -> Any:
            model.forward = forward
            raise MemoryError("no room")

        model.forward = failing
        listener = Listener()
        engine.submit([generation([5, 6], 8, listener)])
        assert listener.wait().failure == "internal"
        assert one_by_one(engine, [([5, 6], 8)]) == wanted
        assert engine.alive


def test_an_engine_that_keeps_failing_gives_up() -> None:
    model = served_model()
    with running_engine(model) as engine:
        model.forward = lambda *_, **__: 1 / 0
        for _ in range(3):
            listener = Listener()
            engine.submit([generation([5], 8, listener)])
            assert listener.wait().failure == "internal"
        engine._thread.join(10)
        assert not engine.alive
        assert not engine.submit([generation([5], 8, Listener())])


def test_prompt_logprobs_are_those_of_generation() -> None:
    """What a greedy text was generated with is what scoring it gives, up to the cache's errors."""
    with running_engine(served_model(), "dense") as engine:
        finish, picked = one_by_one(engine, [([5, 6, 7], 90)])[0]
        assert finish == "length"
        text = [5, 6, 7, *(item.token for item in picked)]
        listener = Listener()
        engine.submit([generation(text, 0, listener, prompt_logprobs=True)])
        event = listener.wait()
        assert event.prompt is not None
        assert event.completion_tokens == 0
        assert [item.token for item in event.prompt] == text
        assert event.prompt[0].logprob is None
        found = torch.tensor([item.logprob for item in event.prompt[3:]])
        torch.testing.assert_close(
            found, torch.tensor([item.logprob for item in picked]), rtol=1e-3, atol=1e-3
        )


def test_end_tokens_and_stops() -> None:
    with running_engine(served_model()) as engine:
        _, picked = one_by_one(engine, [([5, 6, 7], 20)])[0]
        tokens = [item.token for item in picked]
        at = next(i for i in range(1, 20) if tokens[i] not in tokens[:i])
        ended, stopped = Listener(), Listener()
        engine.submit([generation([5, 6, 7], 20, ended, end_tokens=frozenset({tokens[at]}))])
        engine.submit([generation([5, 6, 7], 20, stopped, stops=(chr(0x4E00 + tokens[at]),))])
        for listener in (ended, stopped):
            finish, found = told(listener)
            assert finish == "stop"
            assert found == picked[:at]
            assert listener.events[-1].completion_tokens == at + 1


def test_one_long_prompt_delays_others_by_one_pass() -> None:
    """While a prompt of nine passes is read, a running text goes on token by token."""
    with running_engine(served_model()) as engine:
        times: list[int] = []
        running = Listener()

        def watch(event: Any) -> None:
            times.append(engine.state().prompted)
            running(event)

        engine.submit([generation([2, 3], 600, watch)])
        while len(times) < 5:
            time.sleep(0.001)
        long = Listener()
        engine.submit([generation(list(range(2, 258)) + list(range(2, 250)), 1, long)])
        long.wait()
        seen = sorted({value for value in times if value > 2})
        assert len(seen) >= 6
        for sequence in list(engine._running):
            sequence.cancelled = True


def test_too_little_memory_is_said() -> None:
    with (
        pytest.raises(RotqError, match="hold no page"),
        running_engine(served_model(), kv_memory=10_000),
    ):
        pass
