"""Shared test set-up."""

import gc
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import rotq.checkpoint.child

# tests have no packages (--import-mode=importlib); this lets them import what lies in support/
sys.path.insert(0, str(Path(__file__).parent / "support"))
from fork_server import ForkServer

# Triton decides when a kernel is defined, that is when a launcher first imports it
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# a shell without job control starts background jobs with SIGINT ignored, which their children
# inherit; the tests that interrupt jobs need what a terminal would give them
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own folder; processes that tests start neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def fresh_processes(_user_cache: None) -> Iterator[ForkServer]:
    """Modules that jobs run in fresh processes need not import everything anew, each for seconds.

    tests/checkpoint/test_child.py runs the same ones as users do.
    """
    server = ForkServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotq.checkpoint.child, "_run", server.run)
        yield server
    server.close()


_freeze, _unfreeze = gc.freeze, gc.unfreeze
_MODULES_PER_SWEEP = 20


@pytest.fixture(scope="session", autouse=True)
def _no_waits() -> Iterator[None]:
    """What takes half of a small job's time and no test is about: disks, objects of pytest.

    Jobs collect garbage several times, and a pytest process has a million objects; those that a
    module of tests finds are left out (``_settled``), and jobs do not take them in again.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def _modules() -> Iterator[int]:
    return itertools.count()


@pytest.fixture(scope="module", autouse=True)
def _settled(_no_waits: None, _modules: Iterator[int]) -> None:
    """Now and then with what has become garbage of the objects that were left out."""
    if next(_modules) % _MODULES_PER_SWEEP == 0:
        _unfreeze()
    gc.collect()
    _freeze()
