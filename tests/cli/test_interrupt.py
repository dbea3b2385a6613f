"""An interrupt that Python drops, because it fell into a finalizer, is raised again."""

import os
import signal
import time

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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_dropped_interrupt_comes_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), _interruptible():
        be_interrupted()
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
