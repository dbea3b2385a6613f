"""Training of scales and gains: exact gradients, codes untouched, resumable, never NaN."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_jobs import SMALL, files_of, make_checkpoint, quantize

from rotq.checkpoint.load import load_model
from rotq.recipe import load_recipe
from rotq.report.progress import Progress
from rotq.tuning.train import _schedule, hollow

pytestmark = pytest.mark.slow

ARGUMENTS = ["-c", "w3", *SMALL, "--set", "tuning.steps=0", "--resume", "never"]
TUNED = ["--set", "tuning.steps=8", "--set", "tuning.learning_rate=0.02"]
ONLINE = ["--set", "rotation.down=hadamard", "--set", "output.format=rotq"]
ROUNDED = [*ONLINE, "--set", "activations.bits=4", "--set", "kv_cache.bits=4"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("plain") / "out"
    assert quantize(model, *ARGUMENTS, "-o", output).exit_code == 0
    return output


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tuned") / "out"
    result = quantize(model, *ARGUMENTS, *TUNED, "-o", output)
    assert result.exit_code == 0, result.output
    return output


def test_scales_and_gains_move_and_codes_stay(plain: Path, tuned: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, tuned))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        trained = name.endswith((".weight_scale", "norm.weight", "layernorm.weight"))
        assert torch.equal(tensor, after[name]) == (not trained), name
        assert tensor.dtype == after[name].dtype


def test_the_divergence_falls(model: Path, tmp_path: Path) -> None:
    settings = ("tuning.steps=16", "tuning.learning_rate=0.003", "tuning.seq_len=48")
    one = ["--num-samples", "1", *(part for s in settings for part in ("--set", s))]
    assert quantize(model, *ARGUMENTS, *one, "-o", tmp_path / "out").exit_code == 0
    figures = json.loads((tmp_path / "out" / "report.json").read_text())["tuning"]
    assert figures["steps"] == 16
    assert figures["kl_last_quarter"] < 0.9 * figures["kl_first_quarter"]


def test_an_online_rotation_is_trained_through(model: Path, tmp_path: Path) -> None:
    result = quantize(model, *ARGUMENTS, *TUNED, *ONLINE, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_a_job_stopped_while_tuning_ends_with_the_same_bytes(
    model: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Progress, step: int, total: int, divergence: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rotq.report.progress.PlainProgress.tuning_step", interrupt)
        stopped = quantize(model, *ARGUMENTS, *TUNED, "-o", tmp_path / "out")
    assert stopped.exit_code == 75, stopped.output
    again = quantize(model, *ARGUMENTS[:-1], "required", *TUNED, "-o", tmp_path / "out")
    assert again.exit_code == 0, again.output
    assert files_of(tmp_path / "out") == files_of(tuned)


def test_a_divergence_that_is_not_finite_stops_the_job(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotq.tuning.train._backward", lambda *_: math.nan)
    result = quantize(model, *ARGUMENTS, *TUNED, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "tuning: the divergence is nan at step 1" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("online", [[], ROUNDED], ids=["dense inputs", "rounded inputs"])
def test_gradients_are_those_of_the_whole_model(
    model: Path, online: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed backward against autograd through transformers' own forward, window by window."""
    seen: dict[str, torch.Tensor] = {}

    def look(setting, blocks, outer, ids_BT, original_BTD):  # type: ignore[no-untyped-def]
        divergence = backward(setting, blocks, outer, ids_BT, original_BTD)
        if not seen:
            seen.update(
                {"ids": ids_BT, "divergence": torch.tensor(divergence)}
                | {name: c.grad.clone() for b in blocks for name, c in b.vectors.changes.items()}
            )
        return divergence

    import rotq.tuning.train

    backward = rotq.tuning.train._backward
    monkeypatch.setattr("rotq.tuning.train._backward", look)
    settings = [*ARGUMENTS, *online, "--set", "calibration.precision=highest"]
    assert quantize(model, *settings, *TUNED, "-o", tmp_path / "out").exit_code == 0
    assert quantize(model, *settings, "-o", tmp_path / "plain").exit_code == 0
    original, quantized = load_model(model), load_model(tmp_path / "plain")
    gains = {n: p for n, p in quantized.named_parameters() if n in seen}
    assert len(gains) == 6
    for gain in gains.values():
        gain.requires_grad_()
    with torch.no_grad():
        log_p = original(seen["ids"]).logits.log_softmax(-1)
    log_q = quantized(seen["ids"]).logits.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    divergence.backward()
    torch.testing.assert_close(seen["divergence"], divergence.detach(), rtol=1e-4, atol=1e-6)
    for name, gain in gains.items():
        rms = gain.detach().square().mean().sqrt()
        assert gain.grad is not None
        torch.testing.assert_close(seen[name], gain.grad * rms, rtol=1e-3, atol=1e-6)


def test_the_schedule_warms_up_and_decays() -> None:
    rates = [_schedule(step, 32) for step in range(32)]
    assert rates[0] == 0.25
    assert max(rates) == rates[3]
    assert rates[-1] == pytest.approx(1 / 32)


def test_hollow_keeps_structure_and_buffers() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    empty = hollow(block)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty[1].running_mean is block[1].running_mean
    assert not next(block.parameters()).is_meta


def test_recipe_bounds() -> None:
    with pytest.raises(ValueError, match=r"tuning\.steps: -1"):
        load_recipe(None, {"tuning.steps": -1})
    assert load_recipe(None, {"tuning.steps": 1}).needs_original
