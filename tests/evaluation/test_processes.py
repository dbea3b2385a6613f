"""A score that several processes share is the score of one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from fork_server import ForkServer
from tiny_jobs import make_checkpoint
from tiny_served import byte_tokenizer, served_model

from rotq.calibration.texts import read_text
from rotq.cli.main import main

SHARED = ["--num-processes", "2"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this process, and in those that it starts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments: str | Path) -> Result:
    """``rotq eval`` in this process, which leads those that it starts."""
    command = ["eval", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rotq", *command])
        return CliRunner().invoke(main, command, prog_name="rotq")


def figures(*arguments: str | Path) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, a text and the rows of a task."""
    folder = tmp_path_factory.mktemp("shared")
    make_checkpoint(folder / "model", num_layers=1)
    (folder / "text.txt").write_text(read_text("pydoc").content[:20_000])
    served_model().save_pretrained(folder / "served")
    byte_tokenizer().save_pretrained(folder / "served")
    rows = [{"query": f"{n} and {n}?", "choices": ["a", f"{n}"], "gold": n % 2} for n in range(5)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_windows_shared_have_the_same_figures(folder: Path) -> None:
    arguments = ["ppl", folder / "model", "--text", folder / "text.txt", "--seq-len", "64"]
    arguments += ["--windows", "5", "--stride", "32", "--reference", folder / "model"]
    alone = figures(*arguments)
    assert figures(*arguments, *SHARED) == alone
    assert alone["top1"] == 1.0


def test_questions_shared_have_the_same_figures(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    arguments = ["tasks", folder / "served", "--tasks", "sums", "--task-files", folder]
    alone = figures(*arguments)
    assert figures(*arguments, *SHARED) == alone
    assert alone["tasks"][0]["rows"] == 5


def test_ranks_of_a_launcher_print_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fresh_processes: ForkServer
) -> None:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **{"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)},
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
    }
    arguments = ["ppl", folder / "model", "--text", folder / "text.txt", "--seq-len", "64"]
    arguments += ["--windows", "2"]
    other = fresh_processes.start("rotq", ["eval", *map(str, arguments)], **shared, RANK="1")
    for key, value in {**shared, "RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    first = run(*arguments)
    said = other.communicate()
    assert (first.exit_code, other.returncode) == (0, 0), (first.stderr, said)
    assert "perplexity" in first.stdout
    assert said == ("", "")


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--windows", "1", *SHARED], 1, "2 processes share 1 windows; use fewer processes"),
        (["--device-map", "auto", *SHARED], 2, "--device-map spreads one model"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    folder: Path, more: list[str], code: int, message: str
) -> None:
    text = ["--text", folder / "text.txt", "--seq-len", "64"]
    done = run("ppl", folder / "model", *text, *more)
    assert done.exit_code == code, done.stderr
    assert message in done.stderr
