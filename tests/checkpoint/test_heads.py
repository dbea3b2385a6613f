"""A packed checkpoint under another head than its own, or under none, as transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import W4, W4_SYMMETRIC, Written, edit_tensors, write_checkpoint
from tiny_models import random_ids
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import rotq
from rotq.errors import RotqError
from rotq.formats.activations import ActivationGrid
from rotq.layers.online_heads import OnlineHeads
from rotq.layers.quant_linear import QuantLinear

FAMILIES = ["llama", "llama-biases", "gemma3", "qwen3-moe", "esm", "esmc", "bert", "gpt2"]
FORMATS = ["rotq", "compressed-tensors"]
CLASSIFIERS = [AutoModelForSequenceClassification, AutoModelForTokenClassification]


def hidden(model: Any) -> Tensor:
    """What a model without a head gives, of a model with or without one."""
    with torch.no_grad():
        ids_BT = random_ids(2, 9)
        return model.base_model(ids_BT, use_cache=False).last_hidden_state


def quantized(folder: Path, family: str, format: str, **options: Any) -> Written:
    if family == "gpt2" and format != "rotq":
        pytest.skip("Conv1D has no name in compressed-tensors")
    # transformers reads no zero points of experts
    grid = W4_SYMMETRIC if family == "qwen3-moe" else W4
    return write_checkpoint(folder, family, grids=(grid,), format=format, **options)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings(tmp_path: Path, family: str, format: str) -> None:
    written = quantized(tmp_path, family, format)
    model = AutoModel.from_pretrained(written.path).eval()
    # transformers multiplies with all experts at once
    fused = family == "qwen3-moe" and format != "rotq"
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if fused else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(hidden(model), hidden(written.dense), **tolerance)
    assert any(isinstance(m, QuantLinear) for m in model.modules()) == (format == "rotq")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("auto", CLASSIFIERS, ids=lambda auto: auto.__name__)
@pytest.mark.parametrize("family", ["llama", "esm", "bert"])
def test_new_heads_are_dense_and_the_rest_is_as_it_was(
    tmp_path: Path, family: str, auto: Any, format: str
) -> None:
    written = quantized(tmp_path, family, format)
    model = auto.from_pretrained(written.path, num_labels=3).eval()
    assert torch.equal(hidden(model), hidden(written.dense))
    new = [m for n, m in model.named_modules() if n in ("score", "classifier", "classifier.dense")]
    assert any(isinstance(module, nn.Linear) for module in new)
    with torch.no_grad():
        assert model(random_ids(1, 9)).logits.isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["llama", "esm", "bert"])
def test_a_new_head_learns(tmp_path: Path, family: str, format: str) -> None:
    path = quantized(tmp_path, family, format).path
    model = rotq.load(path, auto=AutoModelForSequenceClassification, num_labels=3)
    ids_BT, labels_B = random_ids(4, 9), torch.tensor([0, 1, 2, 0])
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(learning, lr=1e-2), []
    for _ in range(4):
        losses.append(model(ids_BT, labels=labels_B).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(ids_BT).logits.shape == (4, 3)
    assert losses[-1] < 0.95 * losses[0]


def test_settings_are_those_of_the_configuration(tmp_path: Path) -> None:
    path = quantized(tmp_path, "llama", "rotq").path
    with pytest.raises(ValueError, match="configuration of llama has no number_of_labels"):
        rotq.load(path, auto=AutoModelForSequenceClassification, number_of_labels=3)


@pytest.mark.parametrize("family", ["llama", "esm"])
def test_online_rotations_and_rounding_without_a_head(tmp_path: Path, family: str) -> None:
    grid = ActivationGrid(bits=8, symmetric=True)
    heads = OnlineHeads(rotated=True, grid=grid)
    written = quantized(tmp_path, family, "rotq", rotated=True, inputs=grid, heads=heads)
    model = AutoModel.from_pretrained(written.path).eval()
    assert torch.equal(hidden(model), hidden(written.dense))


@pytest.mark.parametrize("format", FORMATS)
def test_load_keeps_them_packed(tmp_path: Path, format: str) -> None:
    written = quantized(tmp_path, "llama", format)
    model = rotq.load(written.path, auto=AutoModel)
    assert isinstance(model.layers[0].mlp.up_proj, QuantLinear)
    assert torch.equal(hidden(model), hidden(written.dense))
    with torch.no_grad():
        ours = rotq.load(str(written.path))(random_ids(2, 9)).logits
        assert torch.equal(ours, written.dense(random_ids(2, 9)).logits)


def test_saved_without_a_head(tmp_path: Path) -> None:
    written = quantized(tmp_path, "llama", "rotq")
    AutoModel.from_pretrained(written.path).save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(hidden(again), hidden(written.dense))


def by_class(written: Written) -> Path:
    """As rotq wrote checkpoints before, and others do: the class of the layers is the target."""
    file = written.path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]
    file.write_text(json.dumps(config))
    return written.path


@pytest.mark.parametrize("auto", [AutoModel, *CLASSIFIERS], ids=lambda auto: auto.__name__)
@pytest.mark.parametrize("family", ["llama", "esm"])
def test_checkpoints_that_target_a_class(tmp_path: Path, family: str, auto: Any) -> None:
    path = by_class(quantized(tmp_path, family, "rotq"))
    model = auto.from_pretrained(path)
    assert not any(isinstance(m, QuantLinear) for n, m in model.named_modules() if "score" in n)
    assert any(isinstance(m, QuantLinear) for m in model.modules())


def test_a_block_that_lacks_a_layer_is_no_new_head(tmp_path: Path) -> None:
    path = by_class(quantized(tmp_path, "llama", "rotq"))
    name = "model.layers.0.self_attn.q_proj"
    leaves = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    edit_tensors(path, {f"{name}.{leaf}": None for leaf in leaves})
    with pytest.raises(RotqError, match=r"layers\.0\.self_attn\.q_proj is quantized, but"):
        AutoModel.from_pretrained(path)


def test_nor_is_a_norm_of_a_block(tmp_path: Path) -> None:
    written = quantized(tmp_path, "llama", "rotq")
    edit_tensors(written.path, {"model.layers.1.input_layernorm.weight": None})
    with pytest.raises(RotqError, match=r"1 missing keys, first layers\.1\.input_layernorm"):
        rotq.load(written.path, auto=AutoModel)
