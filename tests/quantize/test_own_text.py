"""Jobs that are calibrated on what the model writes itself."""

from pathlib import Path

import pytest
from click.testing import Result
from tiny_jobs import files_of, make_checkpoint, quantize

import rotq.quantize.own_text
import rotq.quantize.pipeline
import rotq.quantize.publish
from rotq.checkpoint.files import read_json

SELF = ["-c", "gptq", "--calibration", "self", "--num-samples", "3", "--seq-len", "40"]
MORE = ["--set", "weights.group_size=32", "--set", "calibration.seed=4"]


@pytest.fixture(autouse=True)
def _no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotq.quantize.publish, "check_reload", lambda *_, **__: None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def assert_fails(result: Result, words: str) -> None:
    assert result.exit_code == 1, result.output
    assert words in result.output.replace("\n", " ")


def test_a_job_writes_its_text_once_and_says_what_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantize(model, *SELF, *MORE, "-o", tmp_path / "whole").exit_code == 0
    data = read_json(tmp_path / "whole" / "rotq_provenance.json")["data"]
    assert data["source"] == "self"
    assert (data["written"]["seed"], data["written"]["tokens"]) == (4, 120)
    assert data["written"]["sha256"] == data["sha256"]
    assert read_json(tmp_path / "whole" / "report.json")["data"]["tokens"] == 120

    saved: list[object] = []
    save_block = rotq.quantize.pipeline.save_block

    def stop_after_the_first(*arguments: object) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(save_block(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(rotq.quantize.pipeline, "save_block", stop_after_the_first)
        assert quantize(model, *SELF, *MORE, "-o", tmp_path / "out").exit_code == 75
    assert (tmp_path / "out.partial" / "own-text.safetensors").is_file()
    other_seed = [*MORE, "--set", "calibration.seed=5"]
    assert_fails(quantize(model, *SELF, *other_seed, "-o", tmp_path / "out"), "another recipe")
    monkeypatch.setattr(rotq.quantize.own_text, "sample_text", None)
    assert quantize(model, *SELF, *MORE, "-o", tmp_path / "out").exit_code == 0
    whole, again = (files_of(tmp_path / name) for name in ("whole", "out"))
    assert whole["model.safetensors"] == again["model.safetensors"]


@pytest.mark.parametrize("ending", [["--dry-run"], ["-o", "OUT"]], ids=["dry-run", "job"])
def test_a_model_that_is_too_large_for_memory_is_refused_with_figures(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: list[str]
) -> None:
    monkeypatch.setattr(rotq.quantize.own_text, "available_memory", lambda: 1_000_000)
    ending = [str(tmp_path / "out") if word == "OUT" else word for word in ending]
    found = quantize(model, *SELF, *MORE, "--device", "cpu", *ending)
    assert_fails(found, "where 1.0 MB are free; name a text")
    assert not (tmp_path / "out.partial").exists()
    named = [*SELF[:2], "--calibration", "pydoc", *SELF[4:]]
    assert quantize(model, *named, *MORE, "--device", "cpu", "--dry-run").exit_code == 0


def test_a_dry_run_writes_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotq.quantize.own_text, "sample_text", None)
    assert quantize(model, *SELF, *MORE, "--dry-run").exit_code == 0
