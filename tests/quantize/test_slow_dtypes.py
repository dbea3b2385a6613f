"""Jobs on checkpoints of 16 bits on a CPU that multiplies no such numbers: computed in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_words import SMALL, write_model
from tiny_models import CONFIGS
from torch import Tensor
from transformers import AutoConfig

import rotq.devices
import rotq.quantize.block_runner
from rotq.checkpoint.files import read_json
from rotq.checkpoint.safetensors import read_entries
from rotq.models.registry import find_adapter
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import load_recipe
from rotq.report import JobReport

IN_ROTQ = {**SMALL, "weights.group_fallback": "auto", "output.format": "rotq"}

pytestmark = pytest.mark.usefixtures("reloaded_here", "numbered_words")


@pytest.fixture(autouse=True)
def without_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as one that has products in fp32 alone."""
    monkeypatch.setattr(
        rotq.devices, "multiplies", lambda dtype, _: dtype not in (torch.bfloat16, torch.float16)
    )


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> set[torch.dtype]:
    """Dtypes of the hidden states that calibration gives to blocks."""
    seen: set[torch.dtype] = set()
    run_block = rotq.quantize.block_runner.run_block

    def watched(block: Any, hidden_BTD: Tensor, kwargs: dict[str, Any]) -> Tensor:
        seen.add(hidden_BTD.dtype)
        return run_block(block, hidden_BTD, kwargs)

    monkeypatch.setattr(rotq.quantize.block_runner, "run_block", watched)
    return seen


def run(model: Path, output: Path, dtype: str = "auto", **changes: Any) -> JobReport:
    values = {**IN_ROTQ, "calibration.source": str(model / "text.txt"), **changes}
    return quantize_model(model, load_recipe(None, values), output, dtype=dtype)


def stored(path: Path) -> dict[str, str]:
    """Dtypes by name, without those of packed layers and of what is always in fp32."""
    entries = read_entries(path / "model.safetensors")
    packed = ("_packed", "_scale", "_shape", "_point", "_signs", "inv_freq")
    return {entry.name: entry.dtype for entry in entries if not entry.name.endswith(packed)}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_computed_in_fp32_and_stored_as_it_was(
    name: str, tmp_path: Path, computed: set[torch.dtype]
) -> None:
    """That a reload in the checkpoint's dtype has equal logits is checked by the job."""
    model = write_model(name, tmp_path / "model", torch.bfloat16)
    adapter = find_adapter(AutoConfig.from_pretrained(model))
    turned = {"rotation.residual": "hadamard"} if adapter.residual_rotation else {}
    report = run(model, tmp_path / "out", **turned)
    assert computed == {torch.float32}
    assert set(stored(tmp_path / "out").values()) <= {"BF16", "I64"}
    assert read_json(tmp_path / "out/config.json")["dtype"] == "bfloat16"
    [note] = [note for note in report.notes if "this CPU" in note]
    assert note.startswith("this CPU multiplies no bfloat16 numbers: computed in float32")
    assert "--dtype bfloat16 insists" in note


@pytest.mark.parametrize(
    "changes",
    [
        {"weights.format": "nvfp4", "weights.symmetric": True, "tuning.steps": 0},
        {"activations.bits": 8, "kv_cache.bits": 4, "rotation.down": "hadamard"},
        {"weights.embedding": 6, "rotation.residual": "hadamard", "rotation.residual_ends": "auto"},
        {"importance.strategy": "gradient", "solver.two_sided": True},
        {"solver.rounder": "trellis", "weights.group_size": -1, "weights.symmetric": True},
    ],
    ids=["nvfp4", "run time", "packed table", "gradients", "trellis"],
)
def test_everything_a_recipe_can_ask_for(
    changes: dict[str, Any], tmp_path: Path, computed: set[torch.dtype]
) -> None:
    model = write_model("llama-biases", tmp_path / "model", torch.bfloat16)
    run(model, tmp_path / "out", **changes)
    assert computed == {torch.float32}
    assert set(stored(tmp_path / "out").values()) == {"BF16"}


@pytest.mark.parametrize(("name", "short"), [("float16", "F16"), ("float32", "F32")])
def test_scales_of_a_packed_table_stay_as_the_recipe_has_them(
    name: str, short: str, tmp_path: Path
) -> None:
    model = write_model("llama", tmp_path / "model", torch.bfloat16)
    run(model, tmp_path / "out", **{"weights.embedding": 6, "weights.scale_dtype": name})
    entries = read_entries(tmp_path / "out/model.safetensors")
    assert {entry.dtype for entry in entries if "scale" in entry.name} == {short}


def test_fp16_too(tmp_path: Path, computed: set[torch.dtype]) -> None:
    model = write_model("llama", tmp_path / "model", torch.float16)
    run(model, tmp_path / "out")
    assert computed == {torch.float32}
    assert set(stored(tmp_path / "out").values()) == {"F16"}


def test_a_dtype_that_was_asked_for_is_taken(tmp_path: Path, computed: set[torch.dtype]) -> None:
    model = write_model("llama", tmp_path / "model", torch.bfloat16)
    report = run(model, tmp_path / "out", dtype="bfloat16")
    assert computed == {torch.bfloat16}
    assert any("--dtype float32 is several times as fast" in note for note in report.notes)
    assert set(stored(tmp_path / "out").values()) == {"BF16"}


def test_the_result_is_as_near_as_in_the_dtype_itself(tmp_path: Path) -> None:
    """Losses of layers, which differ by the rounding of activations alone."""
    model = write_model("llama", tmp_path / "model", torch.bfloat16)
    fast = run(model, tmp_path / "fast", **{"tuning.steps": 0})
    slow = run(model, tmp_path / "slow", dtype="bfloat16", **{"tuning.steps": 0})
    for ours, theirs in zip(fast.layers, slow.layers, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.3)
