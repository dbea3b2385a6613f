"""The tensors, and the files next to them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from tiny_checkpoints import (
    W4,
    W4_SYMMETRIC,
    Written,
    random_quantized,
    write_checkpoint,
)
from tiny_models import tiny_model

from rotq.checkpoint.export import packed_tensors, stored_scale_dtype, write_metadata
from rotq.checkpoint.hub import HubModel, HubName
from rotq.checkpoint.opening import open_source
from rotq.checkpoint.scheme_writing import quantization_config
from rotq.formats.activations import ActivationGrid
from rotq.formats.integer import Grid
from rotq.layers.online_heads import OnlineHeads


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_tensors_equal_compressed_tensors(bits: int, symmetric: bool, group_size: int) -> None:
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    quantized = random_quantized(20, 40, grid, torch.float32)
    ours = packed_tensors("", quantized)
    config = quantization_config({"a": grid}, [], "compressed-tensors")["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(config)
    state = {"weight": quantized.dequantize(), "weight_scale": quantized.scale_NG}
    if quantized.zero_NG is not None:
        state["weight_zero_point"] = quantized.zero_NG
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    assert {name.removeprefix(".") for name in ours} == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[f".{name}"].dtype
        assert torch.equal(tensor, ours[f".{name}"]), name
    dense = PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(dense, quantized.dequantize())


def test_signs_are_stored() -> None:
    signs_R = torch.tensor([1, -1] * 20, dtype=torch.float64)
    tensors = packed_tensors("x", random_quantized(4, 40, W4), signs_R)
    assert tensors["x.input_signs"].dtype == torch.int8
    assert torch.equal(tensors["x.input_signs"].double(), signs_R)


@pytest.mark.parametrize(
    ("model", "grid", "format", "experts", "expected"),
    [
        ("bfloat16", W4, "compressed-tensors", False, "bfloat16"),
        ("bfloat16", W4_SYMMETRIC, "compressed-tensors", False, "bfloat16"),
        ("float16", W4, "compressed-tensors", False, "float16"),
        ("float32", W4, "compressed-tensors", False, "float32"),
        ("float32", W4_SYMMETRIC, "compressed-tensors", False, "float16"),
        ("float32", W4_SYMMETRIC, "compressed-tensors", True, "float32"),
        ("bfloat16", W4, "rotq", False, "float16"),
    ],
)
def test_scale_dtypes(model: str, grid: Grid, format: str, experts: bool, expected: str) -> None:
    got = stored_scale_dtype(
        torch.float16, getattr(torch, model), grid, format, has_experts=experts
    )
    assert got == getattr(torch, expected)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write_checkpoint(tmp_path)


def test_files(written: Written) -> None:
    names = {path.name for path in written.path.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "rotq_provenance.json",
        "rotq_recipe.yaml",
    }
    assert yaml.safe_load((written.path / "rotq_recipe.yaml").read_text()) == {"name": "tiny"}
    assert json.loads((written.path / "rotq_provenance.json").read_text()) == {"seed": 0}


def test_card(written: Written) -> None:
    card = (written.path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "tags": ["rotq", "compressed-tensors", "4-bit"],
    }
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "4 bits, asymmetric, one scale per 8 columns" in card
    assert "`lm_head`" in card
    assert "at run time" not in card


SOMEONE_TINY = HubModel(
    name=HubName(repo="someone/tiny", revision="main"),
    commit="0123456789" * 4,
    folder=Path("cache/models--someone--tiny/snapshots/0"),
    sizes={},
)


def test_untied_and_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("llama-tied", dtype=torch.float32).save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("not for the checkpoint")
    out = tmp_path / "out"
    out.mkdir()
    write_metadata(
        out,
        dataclasses.replace(open_source(source), hub=SOMEONE_TINY),
        quantization=quantization_config(
            {"a": W4}, [], "rotq", heads=OnlineHeads(grid=ActivationGrid(bits=4, symmetric=True))
        ),
        recipe={},
        provenance={},
        dtype=torch.bfloat16,
        untied=True,
    )
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").is_file()
    assert not (out / "notes.txt").exists()
    card = (out / "README.md").read_text()
    assert f"with rotq of `someone/tiny@{SOMEONE_TINY.commit}`." in card
    assert "base_model: someone/tiny\nbase_model_relation: quantized\n" in card
    assert "import rotq" in card
    assert "- at run time: keys and values 4 bits symmetric per head and token\n" in card
