"""What the model's forward does not reach is copied, or left out by name; experts are counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import byte_tokenizer, tiny_family

import rotq.quantize.publish
from rotq.errors import Stopped
from rotq.quantize.estimate import estimate
from rotq.quantize.job_report import FEW_TOKENS, few_tokens
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import Recipe, load_recipe
from rotq.report import JobReport

MTP = {"mtp.fc.weight": torch.arange(32.0).view(4, 8), "mtp.layers.0.norm.weight": torch.ones(8)}
STRANGE = {"critic.weight": torch.zeros(2, 2)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid with experts, layers for multi-token prediction, and a tensor of nobody."""
    folder = tmp_path_factory.mktemp("qwen3-next")
    tiny_family("qwen3_next").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    file = folder / "model" / "model.safetensors"
    save_file({**load_file(file), **MTP, **STRANGE}, file, metadata={"format": "pt"})
    (folder / "text.txt").write_text("The cat sat on the mat, and dogs ran over the hills. " * 20)
    return folder


pytestmark = pytest.mark.usefixtures("reloaded_here")


def recipe_of(checkpoint: Path, preset: str, **changes: Any) -> Recipe:
    small = {
        "calibration.source": str(checkpoint / "text.txt"),
        "calibration.num_samples": 2,
        "calibration.seq_len": 32,
        "weights.group_size": 16,
        "weights.group_fallback": "auto",
        "output.format": "rotq",
    }
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe(Path("configs") / f"{preset}.yaml", {**small, **named})


def quantized(checkpoint: Path, out: Path, *recipe: str, **changes: Any) -> tuple[JobReport, dict]:
    report = quantize_model(checkpoint / "model", recipe_of(checkpoint, *recipe, **changes), out)
    return report, load_file(out / "model.safetensors")


def test_mtp_is_copied_and_named_and_experts_are_counted(checkpoint: Path, tmp_path: Path) -> None:
    report, stored = quantized(checkpoint, tmp_path / "out", "gptq")
    assert all(torch.equal(stored[name], tensor) for name, tensor in MTP.items())
    assert "critic.weight" not in stored
    assert "2 tensors that the model's forward does not reach are copied as they are: mtp.fc" in (
        "\n".join(report.notes)
    )
    assert any("1 tensors are left out, unknown to the model: critic" in n for n in report.notes)
    assert set(report.experts) == {f"model.layers.{i}.mlp.experts" for i in (0, 1)}
    # two experts per token
    assert all(sum(routed) == 2 * 64 for routed in report.experts.values())
    assert any("8 of 8 experts were routed fewer than 256" in note for note in report.notes)
    assert JobReport.from_dict(report.to_dict()) == report


def test_mtp_is_copied_where_scales_are_tuned(checkpoint: Path, tmp_path: Path) -> None:
    _, stored = quantized(checkpoint, tmp_path / "out", "w3", tuning__steps=1, tuning__seq_len=32)
    assert all(torch.equal(stored[name], tensor) for name, tensor in MTP.items())


def test_a_rotated_stream_fits_no_mtp(checkpoint: Path, tmp_path: Path) -> None:
    rotated = {"rotation__residual": "hadamard"}
    report, stored = quantized(checkpoint, tmp_path / "out", "rtn", **rotated)
    assert not MTP.keys() & stored.keys()
    assert any("which a rotated stream does not fit" in note for note in report.notes)
    assert report.experts == {}  # rtn looks at no data
    estimate(checkpoint / "model", recipe_of(checkpoint, "rtn", **rotated))


def test_a_stopped_job_goes_on_with_what_it_has_copied(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(rotq.quantize.publish, "loading_obstacle", _stop)
        with pytest.raises(Stopped):
            quantized(checkpoint, tmp_path / "out", "rtn")
    assert (tmp_path / "out.partial" / "kept.safetensors").is_file()
    _, stored = quantized(checkpoint, tmp_path / "out", "rtn")
    assert all(torch.equal(stored[name], tensor) for name, tensor in MTP.items())
    assert not (tmp_path / "out.partial").exists()


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_few_tokens_are_told_by_name() -> None:
    assert not list(few_tokens({"a.experts": [FEW_TOKENS, 10**6]}))
    (note,) = few_tokens({"a.experts": [0, FEW_TOKENS], "b.experts": [FEW_TOKENS - 1, 10**6]})
    assert note.startswith("2 of 4 experts were routed fewer than 256 calibration tokens; they")
    assert note.endswith("a.experts.0 (0), b.experts.0 (255)")
    (note,) = few_tokens({"a.experts": [0] * 20})
    assert note.endswith("a.experts.7 (0) and 12 more (report.json)")
