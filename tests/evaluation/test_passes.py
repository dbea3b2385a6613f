"""Rows of different lengths in one pass, packed or padded, against each row alone in fp64."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from rotq.calibration.batches import filled
from rotq.evaluation.passes import batches_of_rows, run_rows
from rotq.formats.activations import ActivationGrid
from rotq.layers.online_heads import OnlineHeads
from rotq.models.attention.online import set_heads, use_online_attention
from rotq.models.attention.packed import packs_rows

MASK = 32


ESM1B: dict[str, Any] = {"position_embedding_type": "absolute", "emb_layer_norm_before": True}
MODELS = {
    "esm": lambda: tiny_model("esm"),
    "esm1b": lambda: tiny_model("esm", **ESM1B),
    "esmc": lambda: tiny_model("esmc"),
    "bert": lambda: tiny_model("bert"),
    "gpt2": lambda: tiny_model("gpt2"),
}


def rows_of(*lengths: int) -> list[list[int]]:
    """Token ids with some masks, more in some rows than in others."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 30, (n,), generator=generator).tolist() for n in lengths]
    for number, row in enumerate(rows):
        row[1 : 1 + number] = [MASK] * len(row[1 : 1 + number])
    return rows


ROWS = rows_of(3, 11, 11, 7, 20, 1)


def alone(model: Any, row: list[int]) -> Any:
    return model(torch.tensor([row]), output_hidden_states=True)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_as_if_alone(name: str) -> None:
    model = MODELS[name]()
    assert packs_rows(model) == (name != "gpt2")
    passed = run_rows(model, ROWS, 1, output_hidden_states=True)
    if name != "gpt2":
        assert passed.output.logits.shape[:2] == (1, sum(map(len, ROWS)))
    for number, row in enumerate(ROWS):
        wanted = alone(model, row)
        close(passed.logits(number), wanted.logits[0])
        for ours, theirs in zip(passed.output.hidden_states, wanted.hidden_states, strict=True):
            close(passed.row(ours, number), theirs[0])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["esm", "esmc"])
def test_heads_that_are_rounded_online(name: str) -> None:
    model = tiny_model(name)
    use_online_attention(model)
    heads = OnlineHeads(grid=ActivationGrid(bits=4, symmetric=False))
    for module in model.modules():
        if type(module).__name__ in ("EsmSelfAttention", "EsmcAttention"):
            set_heads(module, heads)
    passed = run_rows(model, ROWS, 1)
    plain = run_rows(tiny_model(name), ROWS, 1)
    for number, row in enumerate(ROWS):
        close(passed.logits(number), alone(model, row).logits[0])
    assert (passed.logits(4) - plain.logits(4)).abs().max() > 1e-3


@torch.inference_mode()
def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("esm")
    before = alone(model, ROWS[4]).logits
    run_rows(model, ROWS, 1)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(alone(model, ROWS[4]).logits, before)
    assert run_rows(model, [ROWS[1], ROWS[2]], 1).output.logits.shape[:2] == (2, 11)


def test_eager_attention_is_padded() -> None:
    model = tiny_model("bert")
    model.set_attn_implementation("eager")
    assert not packs_rows(model)


def test_batches_count_padding_only_where_there_is_some() -> None:
    rows: list[list[int]] = [[0] * length for length in (10, 4, 4, 4, 30, 1)]
    assert filled(rows, 20) == [[4], [0, 1], [2, 3, 5]]
    assert filled(rows, 20, packed=True) == [[4], [0, 1, 2], [3, 5]]
    esm, gpt2 = tiny_model("esm"), tiny_model("gpt2")
    assert batches_of_rows([esm], rows, 20) == filled(rows, 20, packed=True)
    assert batches_of_rows([esm, gpt2], rows, 20) == filled(rows, 20)
