"""Jobs on a trellis: packed, reloaded, resumed, counted, mixed, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_words import word_tokenizer, write_model
from safetensors.torch import load_file
from torch import Tensor

import rotq.quantize.publish
import rotq.quantize.setup
from rotq.checkpoint.load import load_model
from rotq.errors import Stopped
from rotq.formats.trellis import Trellis
from rotq.job.layer_grids import check_rows
from rotq.layers.packed_weight import multiply_as_dense
from rotq.layers.quant_linear import QuantLinear
from rotq.quantize.estimate import estimate
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import Recipe, load_recipe
from rotq.report import JobReport, Progress

PRESET = Path(__file__).parents[2] / "configs" / "t3.yaml"

SMALL = {
    "calibration.num_samples": 3,
    "calibration.seq_len": 24,
    "weights.state_bits": 8,
    "weights.outer_group_size": 16,
    "tuning.steps": 2,
}


@pytest.fixture(autouse=True)
def _reload_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(folder: Path, ids_BT: Tensor, logits_BTV: Tensor, **_: Any) -> None:
        with torch.no_grad():
            model = load_model(folder)
            # native code sums products with a few rows, as experts have them, in another order
            torch.testing.assert_close(model(ids_BT).logits, logits_BTV, rtol=1e-4, atol=1e-4)
            multiply_as_dense(model)
            assert torch.equal(model(ids_BT, use_cache=False).logits, logits_BTV)

    monkeypatch.setattr(rotq.quantize.publish, "check_reload", check)
    fast = word_tokenizer()
    monkeypatch.setattr(rotq.quantize.setup, "load_tokenizer", lambda *_, **__: fast)


def recipe(model: Path, **changes: Any) -> Recipe:
    return load_recipe(PRESET, {**SMALL, "calibration.source": str(model / "text.txt"), **changes})


def run(model: Path, output: Path, **changes: Any) -> JobReport:
    return quantize_model(model, recipe(model, **changes), output)


def test_the_reloaded_model_is_the_one_that_was_measured(tmp_path: Path) -> None:
    """The job checks it; here, that layers are packed paths, at their bits, behind online R4."""
    model = write_model("llama-tied", tmp_path / "model")
    report = run(model, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    down = loaded.model.layers[1].mlp.down_proj
    assert isinstance(down, QuantLinear)
    assert down.grid == Trellis(bits=3, group_size=-1, state_bits=8)
    assert down.input_signs is not None
    assert down.weight_packed.shape == (5, 80)  # 48 rows of 3 bits in words of 32
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["version"] == 7
    assert [layer.bits_per_weight for layer in report.layers][:1] == [3 + 16 / 48]
    assert all(0 < layer.relative_error < 0.2 for layer in report.layers)


def test_saved_again_it_is_the_same(tmp_path: Path) -> None:
    run(write_model("llama-tied", tmp_path / "model"), tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ids = torch.arange(1, 20)[None]
    expected = loaded(ids).logits
    torch.testing.assert_close(load_model(tmp_path / "again")(ids).logits, expected)
    torch.testing.assert_close(load_model(tmp_path / "out", packed=False)(ids).logits, expected)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "esm"])
def test_other_families(name: str, tmp_path: Path) -> None:
    changes = {"rotation.down": "none"} if name == "esm" else {}
    changes |= {} if name == "esm" else {"weights.embedding": 16, "weights.head": 16}
    report = run(write_model(name, tmp_path / "model"), tmp_path / "out", **changes)
    assert {layer.bits for layer in report.layers} == {3}


def test_layers_may_have_other_bits(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    overrides = [{"match": "down_proj", "bits": 1}, {"match": "v_proj", "bits": 8}]
    run(model, tmp_path / "out", **{"weights.overrides": overrides})
    block = load_model(tmp_path / "out").model.layers[0]
    found = [
        layer.grid.bits
        for layer in (block.mlp.down_proj, block.self_attn.v_proj, block.mlp.up_proj)
    ]
    assert found == [1, 8, 3]


def test_an_average_chooses_bits_by_the_loss(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    changes = {"weights.average_bits": 3.4, "weights.group_size": -1}
    report = run(model, tmp_path / "out", **changes)
    found = {layer.bits for layer in report.layers}
    assert {2, 3, 4} >= found
    assert len(found) > 1
    assert report.bits_per_weight <= 3.4
    assert isinstance(load_model(tmp_path / "out").model.layers[0].mlp.up_proj.grid, Trellis)


def test_a_stopped_job_continues_with_the_same_bytes(tmp_path: Path) -> None:
    model = write_model("llama-tied", tmp_path / "model")
    run(model, tmp_path / "whole")

    class Impatient(Progress):
        def block_started(self, index: int, num_blocks: int) -> None:
            if index == 1:
                raise KeyboardInterrupt

    with pytest.raises(Stopped):
        quantize_model(model, recipe(model), tmp_path / "out", progress=Impatient())
    run(model, tmp_path / "out")
    whole, again = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out"))
    assert whole == again


def test_the_estimate_counts_what_is_stored(tmp_path: Path) -> None:
    model = write_model("llama-tied", tmp_path / "model")
    expected = estimate(model, recipe(model))
    run(model, tmp_path / "out")
    stored = sum(
        t.numel() * t.itemsize for t in load_file(tmp_path / "out/model.safetensors").values()
    )
    assert abs(expected.output_bytes - stored) < 0.1 * stored  # a word of padding for 48 rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output.format": "compressed-tensors", "rotation.down": "none"}, "output.format=rotq"),
        ({"solver.method": "rtn"}, "solver.method=gptq"),
        ({"tuning.code_steps": 4}, "tuning.code_steps=0"),
        ({"transform.method": "learned"}, "transform.method=learned"),
        ({"weights.state_bits": 17}, "8 to 16"),
        ({"weights.bits": 9}, "1 to 8"),
        ({"solver.rounder": "scalar", "weights.bits": 1}, "solver.rounder=trellis"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_recipes_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(PRESET, changes)


def test_layers_of_too_few_rows_are_refused() -> None:
    trellis = Trellis(bits=1, group_size=-1, state_bits=16)
    with pytest.raises(ValueError, match=r"k_proj: 15 rows of 1 bits .* 16 bits.* keep"):
        check_rows("k_proj", 15, trellis)
    with pytest.raises(ValueError, match="at least 16 rows"):
        QuantLinear(24, 15, trellis)
