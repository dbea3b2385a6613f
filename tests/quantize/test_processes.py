"""A job that several processes share is the job of one, to rounding of the sums."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
import torch.distributed as dist
from fork_server import ForkServer
from safetensors.torch import load_file
from tiny_jobs import make_checkpoint, quantize

import rotq.quantize.publish
from rotq.calibration.texts import read_text
from rotq.checkpoint.files import read_json
from rotq.errors import RotqError
from rotq.processes import joined, launched
from rotq.ranks import Ranks
from rotq_kernels.rounding import native

pytestmark = pytest.mark.slow


def launch(forks: ForkServer, model: Path, out: Path) -> None:
    """The jobs by two processes, this one and another, as a launcher lets them find each other."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    other = forks.start("rank_jobs", [str(model), str(out)], **shared, RANK="1")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**shared, "RANK": "0"}.items():
            patch.setenv(key, value)
        with joined(1, []) as ranks:
            rank_jobs.run(model, out, ranks=ranks)
    said = other.communicate()
    assert other.returncode == 0, said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, fresh_processes: ForkServer) -> Path:
    """Folders "1" and "2" with the jobs of as many processes."""
    folder = tmp_path_factory.mktemp("ranks")
    model = make_checkpoint(folder / "model", num_layers=2)
    (folder / "text.txt").write_text(read_text("pydoc").content[:20_000])
    with pytest.MonkeyPatch.context() as patch:
        # which these jobs set, and others in this process must find as they are
        patch.setattr(rotq.quantize.publish, "check_reload", rotq.quantize.publish.check_reload)
        patch.setattr(native, "NATIVE_FROM", native.NATIVE_FROM)
        launch(fresh_processes, model, folder / "2")
        rank_jobs.run(model, folder / "1")
    return folder


@pytest.mark.parametrize("name", rank_jobs.JOBS)
def test_two_processes_make_what_one_makes(made: Path, name: str) -> None:
    one, two = (made / size / name for size in ("1", "2"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (two, one))
    assert ours.keys() == theirs.keys()
    # Adam makes steps of slopes that are nothing but rounding; where rows feed back on each
    # other, one code near a tie moves all behind it
    if name not in ("trained", "two_sided"):
        same = [torch.equal(ours[key], tensor) for key, tensor in theirs.items()]
        assert sum(same) >= 0.8 * len(same)  # a code near a tie may go the other way
    found, expected = (read_json(folder / "report.json") for folder in (two, one))
    assert _loss(found) == pytest.approx(_loss(expected), rel=0.02)
    assert found["importance"] == pytest.approx(expected["importance"], rel=0.02)
    assert found["tuning"] == pytest.approx(expected["tuning"], rel=0.05)


def _loss(report: dict[str, Any]) -> float:
    return sum(layer["loss"] for layer in report["layers"])


def test_shares_follow_each_other() -> None:
    shares = [Ranks(rank=rank, size=3).own(range(8)) for rank in range(3)]
    assert [n for share in shares for n in share] == list(range(8))
    assert {len(share) for share in shares} == {2, 3}
    assert [Ranks(rank=rank, size=3).first_of_own(8) for rank in range(3)] == [0, 2, 5]


def test_a_gpu_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    second = Ranks(rank=3, size=4, local=1)
    assert [second.device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert Ranks().device("cuda") == "cuda"
    with pytest.raises(RotqError, match="need a GPU each; --device cuda takes"):
        second.device("cuda:0")
    with pytest.raises(RotqError, match="4 processes need a GPU each, and there are 2"):
        Ranks(rank=2, size=4, local=2).device("auto")


def test_who_was_launched() -> None:
    shared = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert launched(shared)
    assert not launched(shared | {"WORLD_SIZE": "1"})
    assert not launched({"WORLD_SIZE": "2"})


def test_a_process_that_ends_early_is_told() -> None:
    early = r"process 1 has ended early: .*no-such-command"
    with pytest.raises(RotqError, match=early), joined(2, ["no-such-command"]):
        raise AssertionError("unreachable")


def test_more_processes_than_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    arguments = [
        *[make_checkpoint(tmp_path / "model"), "-c", "gptq", "-o", out, "--num-processes", "2"],
        *["--num-samples", "2", "--seq-len", "16", "--set", "calibration.batch_size=2"],
    ]
    monkeypatch.setattr(sys, "argv", ["rotq", "quantize", *map(str, arguments)])
    result = quantize(*arguments)
    assert result.exit_code == 1
    assert "2 processes share 1 batches of calibration windows" in result.stderr
    assert not out.with_name("out.partial").exists()
