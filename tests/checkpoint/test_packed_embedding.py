"""Checkpoints whose embedding, and a head that has a weight of its own, are packed."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import W4, W4_SYMMETRIC, Written, edit_tensors, write_checkpoint
from tiny_models import random_ids
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import rotq
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.source import read_tensor
from rotq.errors import RotqError
from rotq.formats.integer import Grid
from rotq.layers.quant_embedding import QuantEmbedding, TiedHead
from rotq.layers.quant_linear import QuantLinear

SIX = Grid(bits=6, group_size=8, symmetric=True)
FIVE = Grid(bits=5, group_size=-1, symmetric=False)
EIGHT = Grid(bits=8, group_size=24, symmetric=True)

TIED = ["llama-tied", "qwen2", "gemma3", "gpt2", "esm", "bert"]
UNTIED = ["llama", "mixtral", "esm-untied", "esmc"]


def written(folder: Path, family: str, outer: Grid = SIX, **options: Any) -> Written:
    grids = (W4_SYMMETRIC,)
    return write_checkpoint(folder, family, grids=grids, format="rotq", outer=outer, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(random_ids(2, 9), use_cache=False).logits


def stored(path: Path) -> dict[str, Tensor]:
    return {entry.name: read_tensor(entry) for entry in read_entries(path / "model.safetensors")}


DTYPES = itertools.cycle([torch.float32, torch.bfloat16])
"""The next one for each width: three widths of two dtypes have all pairs in two families."""


@pytest.mark.parametrize(
    ("family", "outer", "dtype"),
    [(family, outer, next(DTYPES)) for family in TIED + UNTIED for outer in (SIX, FIVE, EIGHT)],
    ids=lambda value: f"{value.bits} bits" if isinstance(value, Grid) else str(value),
)
def test_logits_are_those_of_the_dequantized_model(
    tmp_path: Path, family: str, outer: Grid, dtype: torch.dtype
) -> None:
    made = written(tmp_path, family, outer, dtype=dtype)
    model = rotq.load(made.path)
    assert torch.equal(logits(model), logits(made.dense))
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    head = model.get_output_embeddings()
    assert isinstance(head, TiedHead if family in TIED else QuantLinear)


@pytest.mark.parametrize("family", TIED + UNTIED)
def test_saved_as_it_came(tmp_path: Path, family: str) -> None:
    made = written(tmp_path, family)
    model = rotq.load(made.path)
    model.save_pretrained(tmp_path / "again")
    before, after = stored(made.path), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(logits(rotq.load(tmp_path / "again")), logits(model))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["version"] == 5


@pytest.mark.parametrize("family", TIED + UNTIED)
def test_dense_again(tmp_path: Path, family: str) -> None:
    made = written(tmp_path, family)
    for model in (rotq.load(made.path, packed=False), rotq.load(made.path).dequantize()):
        assert torch.equal(logits(model), logits(made.dense))
        assert not any(isinstance(m, QuantEmbedding | TiedHead) for m in model.modules())
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert type(embedding) is type(made.dense.get_input_embeddings())
        assert (embedding.weight is head.weight) == (family in TIED)
    if family not in ("gpt2", "mixtral"):  # whose layers have other shapes where they are packed
        model.save_pretrained(tmp_path / "dense")
        assert torch.equal(logits(rotq.load(tmp_path / "dense")), logits(made.dense))


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "gpt2", "esm", "bert"])
def test_a_model_without_a_head(tmp_path: Path, family: str) -> None:
    made = written(tmp_path, family)
    model = AutoModel.from_pretrained(made.path).eval()
    with torch.no_grad():
        hidden, expected = (
            m(random_ids(2, 9), use_cache=False).last_hidden_state
            for m in (model, made.dense.base_model)
        )
    assert torch.equal(hidden, expected)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)


def test_another_head(tmp_path: Path) -> None:
    made = written(tmp_path, "llama-tied")
    model = AutoModelForSequenceClassification.from_pretrained(made.path, num_labels=3)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.score, nn.Linear)


@pytest.mark.parametrize("family", ["llama-tied", "gemma3"])
def test_copies_and_other_dtypes(tmp_path: Path, family: str) -> None:
    model = rotq.load(written(tmp_path, family).path)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    assert again.get_output_embeddings().embedding is again.get_input_embeddings()
    scale = again.get_input_embeddings().weight_scale.clone()
    again.to(torch.bfloat16)
    assert logits(again).dtype == torch.bfloat16
    assert torch.equal(again.get_input_embeddings().weight_scale, scale)


def test_as_many_parameters_as_the_dense_model(tmp_path: Path) -> None:
    for family in ("llama", "llama-tied"):
        made = written(tmp_path / family, family)
        model = rotq.load(made.path)
        for exclude in (False, True):
            expected = made.dense.num_parameters(exclude_embeddings=exclude)
            assert model.num_parameters(exclude_embeddings=exclude) == expected


def test_a_packed_table_keeps_its_size(tmp_path: Path) -> None:
    model = rotq.load(written(tmp_path, "llama-tied").path)
    with pytest.raises(RotqError, match=r"model.embed_tokens is packed.*packed=False"):
        model.resize_token_embeddings(200)
    dense = model.dequantize()
    dense.resize_token_embeddings(200)
    assert logits(dense).shape[-1] == 200
    assert dense.lm_head.weight is dense.model.embed_tokens.weight


def test_ties_of_biases_stay(tmp_path: Path) -> None:
    model = rotq.load(written(tmp_path, "bert").path)
    predictions = model.cls.predictions
    assert predictions.decoder.bias is predictions.bias
    model.tie_weights()
    assert isinstance(predictions.decoder, TiedHead)


def test_a_head_that_is_stored_is_not_shared(tmp_path: Path) -> None:
    """Whatever the configuration says of ties."""
    made = written(tmp_path, "llama-tied")
    own = torch.randn(97, 48)
    edit_tensors(made.path, {"lm_head.weight": own})
    model = rotq.load(made.path)
    assert torch.equal(model.lm_head.weight, own)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)


def test_gradients_reach_what_is_in_front(tmp_path: Path) -> None:
    """The product with a tied table has one for its input, as adapters need."""
    model = rotq.load(written(tmp_path, "llama-tied").path)
    table = model.model.embed_tokens
    x = torch.randn(3, 48, requires_grad=True)
    model.lm_head(x).sum().backward()
    expected = table.dequantize().sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [SIX, EIGHT], ids=lambda grid: f"{grid.bits} bits")
@pytest.mark.parametrize("family", ["llama", "esm-untied"])
def test_transformers_alone_reads_a_packed_head(tmp_path: Path, family: str, grid: Grid) -> None:
    """Of compressed-tensors on symmetric grids: what ``plan_outer`` lets through."""
    made = write_checkpoint(
        tmp_path, family, grids=(W4_SYMMETRIC,), outer=grid, packs_embedding=False
    )
    auto = type(made.dense)
    assert torch.equal(logits(auto.from_pretrained(made.path).eval()), logits(made.dense))
    assert torch.equal(logits(rotq.load(made.path)), logits(made.dense))


def test_compressed_tensors_of_others(tmp_path: Path) -> None:
    """Packed embeddings, as llm-compressor writes them and vLLM looks them up."""
    made = write_checkpoint(tmp_path, "llama", grids=(W4_SYMMETRIC,), outer=EIGHT)
    assert torch.equal(logits(rotq.load(made.path)), logits(made.dense))
    with pytest.raises(AttributeError, match="weight"):  # why rotq does not write such
        AutoModelForCausalLM.from_pretrained(made.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": torch.ones(97, 2, dtype=torch.float16)}, "weight_scale has shape"),
        ({"weight_packed": torch.zeros(97, 4, dtype=torch.int32)}, "weight_packed has shape"),
        ({"weight_shape": None}, "no tensor model.embed_tokens.weight_shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_damage_is_named(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    made = written(tmp_path, "llama-tied")
    edit_tensors(made.path, {f"model.embed_tokens.{key}": t for key, t in change.items()})
    with pytest.raises(RotqError, match=message):
        rotq.load(made.path)


def test_zero_points_that_straddle_words(tmp_path: Path) -> None:
    grid = Grid(bits=7, group_size=16, symmetric=False)
    model = rotq.load(written(tmp_path, "llama-tied", grid).path)
    table = model.model.embed_tokens
    ids = torch.arange(97)
    assert torch.equal(table(ids), table.dequantize())


def test_older_versions_are_still_written_where_nothing_is_packed_outside(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, format="rotq", grids=(W4,)).path
    assert json.loads((path / "config.json").read_text())["quantization_config"]["version"] == 1
