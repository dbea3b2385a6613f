"""Running a module of rotq in a fresh process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rotq.errors import RotqError


def run_module(module: str, arguments: Sequence[str | Path], *, doing: str) -> str:
    """Run ``python -m module`` and return its standard output.

    Args:
        doing: What the process does, for the error: "converting x.gguf".

    Raises:
        RotqError: it ended with an error; the message has the last line it wrote to stderr.
    """
    roots = [str(_root(name)) for name in ("rotq", "rotq_kernels")]
    path = os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = _run(module, [str(each) for each in arguments], {**os.environ, "PYTHONPATH": path})
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RotqError(f"{doing} failed: {lines[-1]}")
    return done.stdout


def _run(
    module: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def _root(package: str) -> Path:
    """The folder a package is imported from."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent
