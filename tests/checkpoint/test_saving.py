"""``save_pretrained`` writes the format a model came in: the same tensors and configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import W4, W4_SYMMETRIC, Written, write_checkpoint
from tiny_models import random_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import rotq
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.source import read_tensor
from rotq.formats.activations import ActivationGrid
from rotq.layers.online_heads import OnlineHeads
from rotq.layers.quant_linear import QuantLinear

CASES = [
    (family, format)
    for family in (
        "llama",
        "llama-tied",
        "qwen2",
        "gemma3",
        "qwen3-moe",
        "esm",
        "esm-untied",
        "bert",
    )
    for format in ("compressed-tensors", "rotq")
] + [("gpt2", "rotq")]


def stored(path: Path) -> dict[str, Tensor]:
    files = path.glob("*.safetensors")
    return {entry.name: read_tensor(entry) for file in files for entry in read_entries(file)}


def quantization(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return found


def same(path: Path, written: Written) -> None:
    """A copy has the checkpoint's tensors, bit by bit, and its quantization_config."""
    tensors, copied = stored(written.path), stored(path)
    assert tensors.keys() == copied.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == copied[name].dtype
        assert torch.equal(tensor, copied[name]), name
    assert quantization(path) == quantization(written.path)


@pytest.mark.parametrize(("family", "format"), CASES)
def test_what_was_loaded_packed_is_saved_as_it_came(
    tmp_path: Path, family: str, format: str
) -> None:
    written = write_checkpoint(tmp_path, family, grids=(W4_SYMMETRIC,), format=format)
    model = rotq.load(written.path)
    model.save_pretrained(tmp_path / "again")
    same(tmp_path / "again", written)
    again = rotq.load(tmp_path / "again")
    assert any(isinstance(module, QuantLinear) for module in again.modules())
    with torch.no_grad():
        ids_BT = random_ids(2, 9)
        assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)


def test_transformers_alone_reads_what_rotq_has_saved(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, grids=(W4,))
    rotq.load(written.path).save_pretrained(tmp_path / "again")
    models = [
        AutoModelForCausalLM.from_pretrained(path) for path in (written.path, tmp_path / "again")
    ]
    with torch.no_grad():
        first, second = (model(random_ids(2, 9)).logits for model in models)
    assert torch.equal(first, second)


def test_what_happens_at_run_time_is_saved(tmp_path: Path) -> None:
    grid = ActivationGrid(bits=8, symmetric=True)
    heads = OnlineHeads(rotated=True, grid=grid)
    written = write_checkpoint(tmp_path, format="rotq", rotated=True, inputs=grid, heads=heads)
    for number, load in enumerate((rotq.load, AutoModelForCausalLM.from_pretrained)):
        load(written.path).save_pretrained(tmp_path / str(number))
        same(tmp_path / str(number), written)


@pytest.mark.parametrize("format", ["compressed-tensors", "rotq"])
def test_shards(tmp_path: Path, format: str) -> None:
    written = write_checkpoint(tmp_path, format=format, max_shard_bytes=20_000)
    rotq.load(written.path).save_pretrained(tmp_path / "again", max_shard_size="15KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 2
    same(tmp_path / "again", written)


@pytest.mark.parametrize("format", ["compressed-tensors", "rotq"])
@pytest.mark.parametrize("family", ["llama", "esm", "bert"])
def test_a_new_head_is_saved_beside_the_codes(tmp_path: Path, family: str, format: str) -> None:
    written = write_checkpoint(tmp_path, family, format=format)
    model = rotq.load(written.path, auto=AutoModelForSequenceClassification)
    model.save_pretrained(tmp_path / "again")
    tensors, copied = stored(written.path), stored(tmp_path / "again")
    packed = {name for name in tensors if "weight_packed" in name}
    assert packed
    assert all(torch.equal(tensors[name], copied[name]) for name in packed)
    assert quantization(tmp_path / "again") == quantization(written.path)
    again = rotq.load(tmp_path / "again", auto=AutoModelForSequenceClassification).state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_dense_is_saved_only_where_it_was_asked_for(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path)
    model = rotq.load(written.path, packed=False)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not any("packed" in name for name in stored(tmp_path / "dense"))
