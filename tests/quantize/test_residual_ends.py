"""R1 that begins and ends at run time, whole jobs: nothing outside the blocks is turned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_words import SMALL, write_model
from torch import Tensor
from transformers import AutoModel

from rotq.checkpoint.files import read_json
from rotq.checkpoint.load import load_model
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.source import read_tensor
from rotq.errors import RotqError, Stopped
from rotq.evaluation.basis import inner_basis_of, is_rotated
from rotq.layers.quant_embedding import TiedHead
from rotq.quantize.estimate import estimate
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import Recipe, load_recipe
from rotq.report import JobReport, Progress

IN_ROTQ = {**SMALL, "output.format": "rotq"}
PLAIN = {"rotation.residual": "hadamard"}
ENDS = {**PLAIN, "rotation.residual_ends": "online"}
EIGHT_BITS = {"weights.bits": 8, "weights.group_size": 8, "tuning.steps": 0}


pytestmark = pytest.mark.usefixtures("reloaded_here", "numbered_words")


def recipe(model: Path, changes: dict[str, Any]) -> Recipe:
    source = {"calibration.source": str(model / "text.txt")}
    return load_recipe(None, {**IN_ROTQ, **source, **changes})


def run(model: Path, output: Path, changes: dict[str, Any], **options: Any) -> JobReport:
    return quantize_model(model, recipe(model, changes), output, **options)


def stored(path: Path) -> dict[str, Tensor]:
    return {entry.name: read_tensor(entry) for entry in read_entries(path / "model.safetensors")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weights.embedding": 6},
        {"rotation.down": "hadamard", "rotation.value": "hadamard"},
        {"importance.strategy": "gradient"},
        {"tuning.code_steps": 2},
    ],
    ids=["dense", "packed", "R2 R4", "gradient", "codes"],
)
def test_a_tied_head_stays_tied(changes: dict[str, Any], tmp_path: Path) -> None:
    """And the model that was measured is the one that is loaded, which the job checks."""
    model = write_model("llama-tied", tmp_path / "model")
    report = run(model, tmp_path / "out", {**ENDS, **changes})
    loaded, tensors = load_model(tmp_path / "out"), stored(tmp_path / "out")
    assert not any(name.startswith("lm_head") for name in tensors)
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["version"] == 6
    assert [name for name in tensors if name.endswith("residual_signs")] == [
        "model.layers.0.residual_signs",
        "model.layers.1.residual_signs",
    ]
    if "weights.embedding" in changes:
        assert type(loaded.get_output_embeddings()) is TiedHead
    else:
        table = loaded.get_input_embeddings().weight
        assert loaded.get_output_embeddings().weight is table
    assert report.rotation["largest_relative_difference"] < 1e-11
    assert not is_rotated(tmp_path / "out")
    without = estimate(model, recipe(model, {**changes, "importance.strategy": "none"}))
    assert estimate(model, recipe(model, ENDS | changes)).output_bytes == without.output_bytes


@pytest.mark.parametrize("name", ["llama-tied", "llama-biases", "qwen3", "mixtral"])
def test_with_eight_bits_hidden_states_are_the_originals(name: str, tmp_path: Path) -> None:
    """What comes out of the model is in its own basis; in between it is turned."""
    model = write_model(name, tmp_path / "model")
    run(model, tmp_path / "out", {**ENDS, **EIGHT_BITS})
    ids_BT = torch.arange(3, 15)[None]
    original, loaded = load_model(model), load_model(tmp_path / "out")
    with torch.no_grad():
        expected, found = (
            each(ids_BT, output_hidden_states=True, use_cache=False).hidden_states
            for each in (original, loaded)
        )
    assert not is_rotated(tmp_path / "out")
    for layer in range(len(found)):
        basis = inner_basis_of(tmp_path / "out", loaded, layer)
        assert (basis is None) == (layer == len(found) - 1)
        back = found[layer] if basis is None else found[layer] @ basis.R_DD.T.float()
        assert (back - expected[layer]).norm() < 0.03 * expected[layer].norm()


def test_a_base_model_and_a_cache_give_the_same(tmp_path: Path) -> None:
    model = write_model("llama-tied", tmp_path / "model")
    run(model, tmp_path / "out", ENDS)
    loaded, base = load_model(tmp_path / "out"), AutoModel.from_pretrained(tmp_path / "out")
    ids_BT = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = loaded.model(ids_BT, use_cache=False).last_hidden_state
        assert torch.equal(base(ids_BT, use_cache=False).last_hidden_state, expected)
        first = base(ids_BT[:, :7], use_cache=True)
        rest = base(ids_BT[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.last_hidden_state, expected[:, 7:], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "happens"),
    [
        (ENDS, "turns the residual stream"),
        ({"rotation.down": "hadamard"}, "rotates inputs"),
        ({"activations.bits": 8}, "rounds inputs"),
        ({"kv_cache.bits": 8}, "rotates or rounds heads"),
    ],
    ids=["R1", "R4", "inputs", "heads"],
)
def test_dense_weights_without_what_happens_at_run_time_are_not_saved(
    changes: dict[str, Any], happens: str, tmp_path: Path
) -> None:
    model = write_model("llama-tied", tmp_path / "model")
    run(model, tmp_path / "out", changes)
    ids_BT, loaded = torch.arange(3, 15)[None], load_model(tmp_path / "out")
    with torch.no_grad():
        expected = loaded(ids_BT).logits
        dense = loaded.dequantize()
        assert torch.equal(dense(ids_BT).logits, expected)
    with pytest.raises(RotqError, match=happens):
        dense.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_stopped_job_continues_with_the_same_bytes(tmp_path: Path) -> None:
    model = write_model("llama-tied", tmp_path / "model")
    run(model, tmp_path / "whole", ENDS)

    class Impatient(Progress):
        def block_started(self, index: int, num_blocks: int) -> None:
            if index == 1:
                raise KeyboardInterrupt

    with pytest.raises(Stopped):
        run(model, tmp_path / "out", ENDS, progress=Impatient())
    run(model, tmp_path / "out", ENDS)
    whole, again = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out"))
    assert whole == again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output.format": "compressed-tensors"}, "only output.format=rotq can express"),
        ({"rotation.residual": "dct"}, "set rotation.residual=hadamard"),
        ({"transform.method": "optrot"}, "transform.method must be fixed"),
    ],
    ids=["format", "kind", "learned"],
)
def test_what_cannot_be_is_refused_by_the_recipe(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(None, {"output.format": "rotq", **ENDS, **changes})


def test_layer_norm_families_are_refused(tmp_path: Path) -> None:
    model = write_model("gpt2", tmp_path / "model")
    with pytest.raises(RotqError, match=r"residual_ends=online is not possible for GPT-2 models"):
        estimate(model, recipe(model, ENDS))


@pytest.mark.parametrize(
    ("name", "is_online"),
    [("llama-tied", True), ("llama", False), ("gpt2", False), ("qwen3", False)],
)
def test_auto_is_online_where_a_head_is_tied_and_the_family_allows_it(
    name: str, is_online: bool, tmp_path: Path
) -> None:
    model = write_model(name, tmp_path / "model")
    run(model, tmp_path / "out", {**ENDS, "rotation.residual_ends": "auto", "tuning.steps": 0})
    assert any(key.endswith("residual_signs") for key in stored(tmp_path / "out")) == is_online
    assert is_rotated(tmp_path / "out") == (not is_online)
