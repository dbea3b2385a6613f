"""Fresh processes: as users get them, and as the other tests do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from fork_server import ForkServer

from rotq.checkpoint import child
from rotq.errors import RotqError

really = child._run  # before the session puts the server in its place


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.mark.parametrize(
    ("module", "arguments", "status", "said"),
    [
        ("rotq", ["no-such-command"], 2, "no-such-command"),
        ("rotq.checkpoint.reload", ["one"], 1, "ValueError: not enough values to unpack"),
    ],
)
def test_forks_are_fresh_processes(
    server: ForkServer, module: str, arguments: list[str], status: int, said: str
) -> None:
    for run in (server.run, really):
        done = run(module, arguments, dict(os.environ))
        assert done.returncode == status
        assert said in done.stderr


def test_a_fork_goes_on_by_itself(server: ForkServer) -> None:
    process = server.start("rotq", ["--version"])
    out, err = process.communicate()
    assert out.startswith("rotq, version")
    assert (err, process.returncode) == ("", 0)
    told = server.start("rotq", ["no-such-command"], COLUMNS="60")
    assert "no-such-command" in told.communicate()[1]
    assert told.returncode == 2


def test_a_fork_that_does_not_end_is_killed(server: ForkServer) -> None:
    process = server.start("http.server", ["0", "--bind", "127.0.0.1"])
    with pytest.raises(TimeoutError, match="did not end"):
        process.communicate(timeout=0.5)
    assert process.returncode == -signal.SIGKILL


def test_the_module_that_users_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_run", really)
    assert child.run_module("rotq", ["--version"], doing="asking").startswith("rotq, version")
    with pytest.raises(RotqError, match=r"^asking failed: .*no-such-command"):
        child.run_module("rotq", ["no-such-command"], doing="asking")
