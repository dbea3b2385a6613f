"""What ends a command is one line, whatever it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from rotq.cli.failures import LONGEST_LINE
from rotq.cli.main import main
from rotq.errors import RotqError
from rotq.ops import TritonMissing

INSPECTION = "rotq.checkpoint.inspection.read_checkpoint"


class PanicException(BaseException):
    """As pyo3 raises it where Rust code panics: no Exception."""


def ended_by(monkeypatch: pytest.MonkeyPatch, error: BaseException, *more: str) -> Result:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(INSPECTION, fail)
    return CliRunner().invoke(main, ["inspect", "x", *more])


def a_torch_that_has_no_memory() -> BaseException:
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("2^60 bytes were there")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "not enough memory: MemoryError"),
        (a_torch_that_has_no_memory(), "not enough memory: "),
        (TritonMissing("kernels need Triton: pip install triton"), "kernels need Triton: pip inst"),
        (RotqError("a\x1b[2J\nb\x07"), "a\\x1b[2J b\\x07\n"),
        (PanicException("index out of bounds"), "unexpected PanicException: index out of bounds"),
        (RuntimeError("odd"), "unexpected RuntimeError: odd; --debug shows where"),
    ],
)
def test_an_error_is_a_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, line: str
) -> None:
    result = ended_by(monkeypatch, error)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"rotq: error: {line}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [PanicException("x"), MemoryError(), TritonMissing("x")])
def test_debug_lets_it_pass(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    if not isinstance(error, Exception):
        with pytest.raises(PanicException):
            ended_by(monkeypatch, error, "--debug")
        return
    assert ended_by(monkeypatch, error, "--debug").exception is error


def test_a_long_message_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ended_by(monkeypatch, RotqError("x" * 10 * LONGEST_LINE))
    assert len(result.stderr) < LONGEST_LINE + 50


def test_an_interrupt_is_no_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    result = ended_by(monkeypatch, KeyboardInterrupt())
    assert result.exit_code == 1
    assert "rotq: error" not in result.stderr


def test_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "rotq", "quantize", "--print-config"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_a_line() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "rotq", "quantize", "--print-config"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr == b"rotq: error: No space left on device\n"


@pytest.mark.parametrize(("name", "code"), [("x" * 5000, 1), ("a/" * 2500, 1), ("\udcff", 2)])
def test_a_path_that_cannot_be_is_a_line(name: str, code: int) -> None:
    result = CliRunner().invoke(main, ["inspect", name])
    assert result.exit_code == code
    assert result.stderr.startswith("rotq: error: ")
    assert "unexpected" not in result.stderr
