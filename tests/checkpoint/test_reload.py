"""The fresh process accepts equal logits and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import W8, Written, write_checkpoint
from tiny_models import random_ids

from rotq.checkpoint import reload
from rotq.checkpoint.child import run_module
from rotq.checkpoint.reload import check_reload, compare
from rotq.checkpoint.shards import save_tensors
from rotq.errors import CheckFailed, RotqError


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A fresh process costs seconds of imports; one test has a real one."""

    def run(module: str, arguments: list[str | Path], **_: str) -> str:
        assert module == reload.__name__
        capsys.readouterr()
        reload.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    monkeypatch.setattr(reload, "run_module", run)


def probe(written: Written) -> tuple[torch.Tensor, torch.Tensor]:
    ids_BT = random_ids(2, 12)
    with torch.no_grad():
        return ids_BT, written.dense(ids_BT, use_cache=False).logits


def test_equal_logits_in_a_fresh_process(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path)
    check_reload(written.path, *probe(written))


@pytest.mark.usefixtures("in_process")
def test_one_different_bit(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path)
    ids_BT, logits_BTV = probe(written)
    check_reload(written.path, ids_BT, logits_BTV)
    logits_BTV[1, 3, 5] = logits_BTV[1, 3, 5].nextafter(torch.tensor(9.0))
    with pytest.raises(CheckFailed, match=r"differ by up to .*e-0\d \(1 of 2328 values\)"):
        check_reload(written.path, ids_BT, logits_BTV)


@pytest.mark.usefixtures("in_process")
def test_other_weights(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "a")
    other = write_checkpoint(tmp_path / "b", grids=(W8,))
    with pytest.raises(CheckFailed, match="does not reproduce"):
        check_reload(other.path, *probe(written))


def test_another_dtype_is_not_equal(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path)
    ids_BT = random_ids(1, 4)
    with torch.no_grad():
        logits_BTV = written.dense(ids_BT, use_cache=False).logits
    save_tensors(tmp_path / "probe", {"ids_BT": ids_BT, "logits_BTV": logits_BTV.double()})
    with pytest.raises(CheckFailed, match=r"expected torch\.float64"):
        compare(written.path, tmp_path / "probe", trust_remote_code=False)


def test_a_failing_child_is_one_line() -> None:
    with pytest.raises(RotqError, match=r"^counting failed: .*") as caught:
        run_module("rotq.no_such_module", [], doing="counting")
    assert "\n" not in str(caught.value)
