"""Attention in another's place: the same result, and refusals."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import random_ids, tiny_model
from torch import Tensor

from rotq.errors import RotqError
from rotq.models.attention.replaced import (
    AttentionCall,
    attend,
    replaced_attention,
    visible,
)


def plain(call: AttentionCall) -> Tensor:
    q_BKGTD = call.q_BHTD.unflatten(1, (call.k_BKTD.shape[1], -1)) * call.scale
    visible_QS = visible(0, q_BKGTD.shape[3], call.window)
    return attend(q_BKGTD, call.k_BKTD, call.v_BKTD, visible_QS).flatten(1, 2).transpose(1, 2)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "mixtral"])
def test_same_logits(family: str) -> None:
    model = tiny_model(family)
    ids_BT = random_ids(2, 12)
    expected = model(ids_BT, use_cache=False).logits
    layers = []

    def attention(call: AttentionCall) -> Tensor:
        layers.append(call.layer)
        return plain(call)

    with replaced_attention(model, attention):
        found = model(ids_BT, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert layers == [0, 1]
    # and it is gone afterwards
    torch.testing.assert_close(model(ids_BT, use_cache=False).logits, expected, rtol=0, atol=0)
    assert layers == [0, 1]


def test_is_put_back_after_an_error() -> None:
    model = tiny_model("llama")

    def fail(_: AttentionCall) -> Tensor:
        raise RotqError("no")

    with pytest.raises(RotqError, match="no"), replaced_attention(model, fail):
        model(random_ids(1, 4), use_cache=False)
    assert model.config._attn_implementation == "sdpa"


def test_visible() -> None:
    assert visible(0, 3, 0).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert visible(2, 2, 2).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("module", "extra", "message"),
    [
        ({"layer_idx": None}, {}, "does not know its layer"),
        ({"is_causal": False}, {}, "is not causal"),
        ({}, {"softcap": 30.0}, "attention with softcap"),
        ({}, {"s_aux": torch.zeros(2)}, "attention with s_aux"),
        ({}, {"value": torch.zeros(1, 2, 3, 4)}, "differ"),
    ],
)
def test_refusals(module: dict[str, Any], extra: dict[str, Any], message: str) -> None:
    from transformers import AttentionInterface

    model = tiny_model("llama")
    given = {"query": torch.zeros(1, 4, 3, 8), "key": torch.zeros(1, 2, 3, 8)}
    given["value"] = extra.pop("value", torch.zeros(1, 2, 3, 8))
    with replaced_attention(model, plain):
        run = AttentionInterface._global_mapping["rotq_replaced"]
        caller = SimpleNamespace(**{"layer_idx": 0, "is_causal": True, **module})
        with pytest.raises(RotqError, match=message):
            run(caller, mask=None, **given, **extra)
