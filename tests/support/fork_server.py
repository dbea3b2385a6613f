"""Fresh processes that need not import torch and transformers: forks of one that has.

``ForkServer().run(module, arguments, environment)`` is ``python -m module`` in a process that has
loaded a model of its own, which imports what loading needs, and has done nothing else.
``ForkServer().start(module, arguments)`` is one that goes on by itself. ``python fork_server.py``
is the process that forks: it reads a request per line, and answers with the exit status or the
number of the process.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import redirect_stderr, suppress
from pathlib import Path
from subprocess import CompletedProcess

_IGNORED = {"PYTEST_CURRENT_TEST", "PYTHONPATH"}


class ForkServer:
    """Starts at its first use, and ends with the process that has it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._environment: dict[str, str] = {}

    def run(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> CompletedProcess[str]:
        """Where a test has changed the environment, which imports look at, really a new process."""
        self._begin(environment)
        command = [sys.executable, "-m", module, *arguments]
        if _decisive(environment) != _decisive(self._environment):
            return subprocess.run(
                command, capture_output=True, text=True, env=dict(environment), check=False
            )
        with tempfile.TemporaryDirectory(prefix="rotq-fork-") as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            number = self.ask(module, list(arguments), str(Path.cwd()), str(out), str(err), None)
            return CompletedProcess(command, self.ask(number), out.read_text(), err.read_text())

    def start(self, module: str, arguments: Sequence[str], **environment: str) -> Fork:
        """A process that the caller ends, with more in its environment."""
        self._begin(os.environ)
        return Fork(self, module, arguments, environment)

    def _begin(self, environment: Mapping[str, str]) -> None:
        if self._process is None:
            self._environment = dict(environment)
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
            )

    def ask(self, *request: object) -> int:
        """The number of a process that has begun; or, asked for that, its exit status."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()  # it ends with its input


class Fork:
    """A process of a ``ForkServer``, with what tests take of ``Popen[str]``."""

    def __init__(
        self,
        server: ForkServer,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        self.returncode: int | None = None
        self._server = server
        with tempfile.TemporaryDirectory(prefix="rotq-fork-") as folder:
            pipes = [Path(folder, name) for name in ("out", "err")]
            for pipe in pipes:
                os.mkfifo(pipe)
            request = [module, list(arguments), str(Path.cwd()), *map(str, pipes)]
            self.pid = server.ask(*request, dict(environment))
            self.stdout, self.stderr = (pipe.open(encoding="utf-8") for pipe in pipes)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """What is left to read, once the process has ended.

        Raises:
            TimeoutError: it did not end, and was killed.
        """
        if self.returncode is not None:
            return "", ""
        with ThreadPoolExecutor(2) as pool, self.stdout, self.stderr:
            reads = [pool.submit(pipe.read) for pipe in (self.stdout, self.stderr)]
            late = wait(reads, timeout).not_done
            if late:
                self.kill()
        out, err = (read.result() for read in reads)
        self.returncode = self._server.ask(self.pid)
        if late:
            raise TimeoutError(f"process {self.pid} did not end; it said {out!r} and {err!r}")
        return out, err


def _decisive(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _IGNORED}


def _load_a_model() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import rotq.checkpoint.reload
    import rotq.cli.main  # noqa: F401
    from rotq.checkpoint.load import load_model

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_attention_heads=1, **sizes))
    with tempfile.TemporaryDirectory(prefix="rotq-fork-") as folder, torch.no_grad():
        model.save_pretrained(folder)
        load_model(Path(folder))(torch.zeros(1, 1, dtype=torch.int64), use_cache=False)


def _serve() -> None:
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        _load_a_model()
    for line in sys.stdin:
        request = json.loads(line)
        if len(request) == 1:
            answer = os.waitstatus_to_exitcode(os.waitpid(request[0], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _become(*request)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _become(
    module: str,
    arguments: list[str],
    folder: str,
    out: str,
    err: str,
    environment: dict[str, str] | None,
) -> None:
    """Does not return; without an environment it leaves at once, otherwise as Python does."""
    os.chdir(folder)
    os.environ.update(environment or {})
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # requests are for others
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv[1:] = arguments
    warnings.filterwarnings("ignore", message=".*found in sys.modules after import of package")
    status = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if environment is not None:
        sys.exit(status)
    os._exit(status)


if __name__ == "__main__":
    _serve()
