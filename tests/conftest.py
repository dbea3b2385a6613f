"""Shared test set-up."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# tests have no packages (--import-mode=importlib); this lets them import what lies in support/
sys.path.insert(0, str(Path(__file__).parent / "support"))

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
