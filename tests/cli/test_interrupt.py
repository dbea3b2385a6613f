"""A job that is interrupted: dropped interrupts come again, and many are as good as one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rotq.cli.quantize import _interruptible


class Finalized:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)


def be_interrupted() -> None:
    Finalized()
    time.sleep(5)
    pytest.fail("the interrupt was dropped")


def test_a_dropped_interrupt_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest's own, on a busy machine, is still at work when the interrupt comes again
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _interruptible():
        be_interrupted()
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


LEAVING = """
import atexit, os, signal, sys, time
from rotq.cli.main import main

def late():
    os.kill(os.getpid(), {number})
    time.sleep(0.2)

atexit.register(late)  # runs after what is registered later

class Pipeline:
    @staticmethod
    def quantize_model(*_, **__):
        os.kill(os.getpid(), {number})
        time.sleep(5)

sys.modules["rotq.quantize.pipeline"] = Pipeline
main(["quantize", "m", "-o", "out"])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_the_process_leaves(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    script = LEAVING.format(number=int(number))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 75, done.stderr
    assert done.stderr == "rotq: error: stopped; the same command continues\n"
