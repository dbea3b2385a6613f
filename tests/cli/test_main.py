"""Errors as lines and exit codes; help without torch."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from rotq import __version__
from rotq.cli.main import main
from rotq.errors import CheckFailed, RotqError, Stopped

INSPECTION = "rotq.checkpoint.inspection.read_checkpoint"


def raising(error: BaseException) -> object:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (RotqError("no such thing"), 1),
        (CheckFailed("no such thing"), 3),
        (Stopped("no such thing"), 75),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, error: RotqError, exit_code: int
) -> None:
    monkeypatch.setattr(INSPECTION, raising(error))
    result = CliRunner().invoke(main, ["inspect", "x"])
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert result.stderr == "rotq: error: no such thing\n"


def test_unexpected_errors_are_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(INSPECTION, raising(IndexError("list\nindex")))
    result = CliRunner().invoke(main, ["inspect", "x"])
    assert result.exit_code == 1
    expected = "rotq: error: unexpected IndexError: list index; --debug shows where\n"
    assert result.stderr == expected


@pytest.mark.parametrize("error", [RotqError("no such thing"), IndexError("list index")])
def test_debug_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(INSPECTION, raising(error))
    result = CliRunner().invoke(main, ["inspect", "x", "--debug"])
    assert result.exception is error
    assert "rotq: error" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "No such command 'quantise'"),
        (["inspect"], "Missing argument 'CHECKPOINT'; see 'rotq inspect --help'"),
        (["inspect", "x", "--verfy"], "No such option '--verfy'"),
        (["eval"], "Missing command"),
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, arguments, prog_name="rotq")
    assert result.exit_code == 2
    assert result.stderr.startswith("rotq: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"rotq, version {__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["eval", "ppl", "-h"]])
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom rotq.cli.main import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_python_m_rotq() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rotq", "inspect", "missing"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    said = "it is no folder and no .gguf file here, and no hub id ORG/NAME[@REVISION]"
    assert done.stderr == f"rotq: error: missing does not exist: {said}\n"


def test_help_page_is_current() -> None:
    root = Path(__file__).parents[2]
    script = root / "scripts" / "cli_docs.py"
    code = f"import runpy; print(runpy.run_path({str(script)!r})['render'](), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (root / "docs" / "cli.md").read_text(encoding="utf-8"), (
        "docs/cli.md is stale: run python scripts/cli_docs.py"
    )
