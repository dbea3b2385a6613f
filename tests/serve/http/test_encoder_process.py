"""A tokenizer in a process of its own: whatever it does costs one text."""

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from odd_tokenizers import BACKTRACKS, HANGS, panicking_tokenizer, templated_tokenizer
from tiny_served import byte_tokenizer

from rotq.errors import RotqError
from rotq.serve.http.encoder_process import EncoderLost, EncoderProcess

HELLO = byte_tokenizer()("hello")["input_ids"]


@pytest.fixture
def process_of() -> Iterator[Callable[[Any], EncoderProcess]]:
    made: list[EncoderProcess] = []

    def make(tokenizer: Any) -> EncoderProcess:
        made.append(EncoderProcess(pickle.dumps(tokenizer)))
        return made[-1]

    yield make
    for process in made:
        process.close()


def ids(process: EncoderProcess, text: str = "hello", seconds: float = 60) -> dict[str, Any]:
    return process.call("encode", seconds, text=text, special=True)


def says(process: EncoderProcess, text: str, seconds: float = 60) -> dict[str, Any]:
    messages = [{"role": "user", "texts": [text]}]
    return process.call("converse", seconds, messages=messages, longest=10**6)


def test_it_encodes(process_of: Any) -> None:
    process = process_of(byte_tokenizer())
    for _ in range(3):
        assert ids(process)["ids"] == HELLO


def test_a_template_that_hangs_costs_one_text(process_of: Any) -> None:
    process = process_of(templated_tokenizer(HANGS))
    assert says(process, "hello")["ids"] == HELLO
    began = time.monotonic()
    with pytest.raises(EncoderLost, match="took too long"):
        says(process, "hang", seconds=0.5)
    assert time.monotonic() - began < 20
    assert says(process, "hello")["ids"] == HELLO


def test_a_panic_costs_one_text(process_of: Any) -> None:
    process = process_of(panicking_tokenizer())
    for _ in range(2):
        assert "PanicException" in ids(process, BACKTRACKS)["failed"]
        assert ids(process)["ids"] == HELLO


def test_a_template_that_takes_all_memory_costs_one_text(process_of: Any) -> None:
    grows = "{% set ns = namespace(x='a') %}{% for i in range(9) %}{% set ns.x = ns.x * 9999 %}"
    process = process_of(templated_tokenizer(grows + "{% endfor %}{{ ns.x }}"))
    assert says(process, "hello").keys() & {"refused", "failed"}
    assert ids(process)["ids"] == HELLO


def test_a_process_that_was_killed_while_idle_costs_nothing(process_of: Any) -> None:
    process = process_of(byte_tokenizer())
    process.start()
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait()
    assert ids(process)["ids"] == HELLO


def test_signals_for_all_of_a_terminal_leave_it_alone(process_of: Any) -> None:
    process = process_of(byte_tokenizer())
    process.start()
    assert process._process is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process._process.pid, number)
    before = process._process.pid
    assert ids(process)["ids"] == HELLO
    assert process._process.pid == before


def test_it_ends_with_its_owner(process_of: Any) -> None:
    process = process_of(byte_tokenizer())
    process.start()
    child, process._process = process._process, None
    assert child is not None
    # what the system does for an owner that is killed
    assert process._connection is not None
    process._connection.close()
    child.wait(20)


def test_closing_ends_what_it_does(process_of: Any) -> None:
    process = process_of(templated_tokenizer(HANGS))
    process.start()
    found: list[Exception] = []

    def ask() -> None:
        try:
            says(process, "hang")
        except RotqError as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    process.close()
    thread.join(20)
    assert len(found) == 1
    with pytest.raises(EncoderLost, match="shutting down"):
        ids(process)
    process.close()


class Unloadable:
    """A tokenizer whose own code is missing elsewhere."""

    def __reduce__(self) -> Any:
        return (__import__, ("a_module_that_is_not_there",))


def test_a_tokenizer_that_does_not_load_elsewhere_is_said(process_of: Any) -> None:
    with pytest.raises(RotqError, match=r"does not load in a process of its own: ModuleNotFound"):
        process_of(Unloadable()).start()
