"""PackedCache in the model and under generate(), against a dense cache of decoded codes."""

from typing import Any

import pytest
import torch
from kv_oracle import calibration_of, oracle_cache
from tiny_models import random_ids, tiny_model
from torch import Tensor

from rotq.kv.cache import PackedCache

FAMILIES = ["llama", "mistral", "qwen3", "gemma3", "mixtral"]


def logits_of(model: Any, cache: Any, ids_BT: Tensor, chunks: list[int], **more: Any) -> Tensor:
    """Logits of all columns, fed in chunks of these lengths."""
    found, at = [], 0
    for length in chunks:
        now = ids_BT[:, at : at + length]
        at += length
        given = {
            name: value[:, :at] if name == "attention_mask" else value
            for name, value in more.items()
        }
        found.append(model(input_ids=now, past_key_values=cache, use_cache=True, **given).logits)
    assert at == ids_BT.shape[1]
    return torch.cat(found, dim=1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("recent", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stepwise_equals_decoded_history(family: str, recent: int) -> None:
    model = tiny_model(family)
    calibration = calibration_of(model, recent=recent)
    ids, chunks = random_ids(2, 40), [7, *[1] * 20, 2, 9, 1, 1]
    expected = logits_of(model, oracle_cache(calibration), ids, chunks)
    found = logits_of(model, PackedCache(model, calibration), ids, chunks)
    assert_close(found, expected)
    plain = model(input_ids=ids).logits
    assert (found - plain).abs().max() > 0.01
