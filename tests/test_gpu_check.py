"""scripts/gpu_check.py without a GPU: it refuses, and runs dry from end to end; docs/gpu.md."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
STEPS = ("0", "C0", "C1", "C2", "C3", "C4", "C5", "S1", "G1", "G2", "T1", "T2", "T3", "T4", "T5")
MODELS = ("E1", "E2", "E3", "E4")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, cwd=ROOT
    )


def module_of(file: Path) -> Any:
    """A script's, which is in no package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stderr == "gpu_check: no CUDA device; --dry runs in Triton's interpreter\n"


@pytest.mark.slow
def test_dry(tmp_path: Path) -> None:
    done = run("--dry", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    took = {line.split()[0] for line in done.stdout.splitlines() if " took " in line}
    assert took == {*STEPS, *MODELS}
    report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert report["failures"] == 0
    assert "T1 decode 100 eager" in report["results"]


def test_a_step_that_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: no step begins."""
    for name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # the script sets it; what it was comes back
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    arguments = ["--dry", "--only", "T4,E,G2", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    assert module_of(SCRIPT).main() == 0
    said = capsys.readouterr().out
    for name in ("T4", *MODELS):
        assert f"{name:4} SKIPPED: 0 s are left" in said


def test_the_page_has_the_figures() -> None:
    module = module_of(ROOT / "scripts/gpu/figures.py")
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    rows = [
        line.strip("| ").split(" | ") for line in page.splitlines() if "gpu_check.py --o" in line
    ]
    found = {row[0]: row[1] for row in rows if len(row) >= 3}
    assert found == {name: modelled for name, (modelled, _) in module.FIGURES.items()}
    assert len(found) == 11
