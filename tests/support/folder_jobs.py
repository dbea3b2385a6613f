"""Jobs whose parts are a few letters: all that happens is what a job's folder does.

``python folder_jobs.py`` forks the children that ``Killer`` kills: it is small, where a process of
pytest takes a tenth of a second for each.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rotq.disk.files import sha256_of, whole_file
from rotq.job.folder import JobFolder
from rotq.job.opening import find_place, open_folder

FINGERPRINT: dict[str, Any] = {"recipe": {"bits": 3}, "tokenizer.json": "abc"}

PARTS = ("outer", "block-00000", "block-00001")

TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
"""Audit events of Python, each told before it happens."""


def opened(
    output: Path, *, resume: str = "auto", overwrite: bool = False, **inputs: Path
) -> AbstractContextManager[JobFolder]:
    place = find_place(output, resume=resume, overwrite=overwrite, inputs=inputs)
    return open_folder(place, resume=resume, overwrite=overwrite)


def finish_part(folder: JobFolder, name: str, content: str) -> None:
    with whole_file(folder.part(name)) as file:
        file.write(content.encode())
    folder.record(name, {"content": content})


def assemble(folder: JobFolder, weights: str = "weights") -> None:
    folder.checkpoint.mkdir()
    (folder.checkpoint / "model.safetensors").write_text(weights)
    files = {"model.safetensors": sha256_of(folder.checkpoint / "model.safetensors")}
    provenance = folder.checkpoint / "rotq_provenance.json"
    provenance.write_text(json.dumps({"files": files}))


def run_job(output: Path, *, seed: int = 0, resume: str = "auto", overwrite: bool = False) -> None:
    """Every part says which job has made it, and so does the checkpoint."""
    with opened(output, resume=resume, overwrite=overwrite) as folder:
        folder.claim({**FINGERPRINT, "seed": seed})
        if folder.is_published:
            folder.leave()
            return
        for name in PARTS:
            if not folder.finished(name):
                finish_part(folder, name, f"{name} of {seed};")
        folder.verify()
        assemble(folder, "".join(folder.part(name).read_text() for name in PARTS))
        folder.publish()


def weights_of(seed: int) -> str:
    return "".join(f"{name} of {seed};" for name in PARTS)


def partial_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


class Killer:
    """Runs actions in children that are killed before their n-th touch of the disk."""

    def __init__(self) -> None:
        path = os.pathsep.join(sys.path)
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def __call__(self, action: Callable[[], None], number: int) -> bool:
        """Whether the action came that far; it is complete otherwise.

        Args:
            action: That pickle can send.
            number: Of the touch, from 1.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((action, number), self._process.stdin)
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        assert os.WIFSIGNALED(status) or status == 0, "the action failed"
        return os.WIFSIGNALED(status)

    def close(self) -> None:
        self._process.communicate()  # it ends with its input


def _run(action: Callable[[], None], number: int) -> None:
    """Does not return."""
    left = number

    def count(event: str, arguments: Any) -> None:
        nonlocal left
        if event in TOUCHES:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    # a kill loses nothing of what the system was told; only a power failure would
    os.fsync = lambda _: None  # type: ignore[assignment]
    sys.addaudithook(count)
    try:
        action()
        os._exit(0)
    finally:
        os._exit(1)


def _serve() -> None:
    while True:
        try:
            action, number = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            _run(action, number)
        sys.stdout.write(f"{os.waitpid(child, 0)[1]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
