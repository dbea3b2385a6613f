"""Jobs whose parts are a few letters: all that happens is what a job's folder does."""

import json
import os
import signal
import sys
import warnings
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


def killed(action: Callable[[], None], number: int) -> bool:
    """Run an action in a child that is killed before its n-th touch of the disk.

    Returns:
        Whether it came that far; the action is complete otherwise.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child runs no thread's code
        child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, "the action failed"
        return os.WIFSIGNALED(status)
    left = number

    def count(event: str, arguments: Any) -> None:
        nonlocal left
        if event in TOUCHES:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        action()
        os._exit(0)
    finally:
        os._exit(1)
