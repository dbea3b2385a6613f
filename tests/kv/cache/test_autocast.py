"""Under autocast, and when a model changes its dtype: attention follows, codes are not rounded."""

from typing import Any

import pytest
import torch
from kv_oracle import calibration_of
from tiny_models import random_ids, tiny_model
from torch import Tensor
from transformers import DynamicCache

from rotq.autocast import lowered, switched_off
from rotq.errors import RotqError
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.pool.packed import PackedPool
from rotq.kv.pool.pool import Row

IDS = random_ids(2, 24)
LOWER = [torch.bfloat16, torch.float16]


@torch.no_grad()
def stepwise(model: Any, cache: Any, dtype: torch.dtype | None) -> Tensor:
    found = []
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        for chunk in IDS.split([9, *[1] * 15], dim=1):
            found.append(model(input_ids=chunk, past_key_values=cache).logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_whole_tokens_are_as_in_a_dense_cache(
    family: str, dtype: torch.dtype, weights: torch.dtype
) -> None:
    model = tiny_model(family, dtype=weights)
    expected = stepwise(model, DynamicCache(config=model.config), dtype)
    exact = stepwise(tiny_model(family), DynamicCache(config=model.config), None)
    found = stepwise(model, PackedCache(model, calibration_of(model, sinks=64)), dtype)
    assert found.dtype == expected.dtype
    worst = (expected.double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 2 * worst


@pytest.mark.parametrize("lengths", [[40], [20, *[1] * 20]], ids=["a chunk", "steps"])
@pytest.mark.parametrize("dtype", LOWER)
@torch.no_grad()
def test_codes_and_what_is_read_of_them_are_not_rounded(
    dtype: torch.dtype, lengths: list[int]
) -> None:
    """Queries, keys and values of the first layer are the same with and without autocast."""
    model = tiny_model("llama", dtype=dtype)
    calibration, pages = calibration_of(model), []
    ids, seen = random_ids(1, 40), []
    projection = model.model.layers[0].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for enabled in (False, True):
        cache = PackedCache(model, calibration)
        if not enabled:
            seen.clear()
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            for chunk in ids.split(lengths, dim=1):
                model(input_ids=chunk, past_key_values=cache)
        pages.append(cache.layers[0].pages)
    for one, other in zip(*(held.tensors() for held in pages), strict=True):
        assert torch.equal(one, other)
    half = len(seen) // 2
    for one, other in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_a_pool() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    calibration = calibration_of(model, page_size=64, sinks=2)
    pool = PackedPool(model, calibration, num_pages=2, num_sinks=1, table_width=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for count, fresh in ((0, 8), (8, 1)):
            pool.plan([Row(pages=[0], count=count, fresh=fresh)], fresh)
            ids = IDS[:1, count : count + fresh]
            logits = model(input_ids=ids, past_key_values=pool, use_cache=True).logits
    assert torch.isfinite(logits).all()
    assert logits.dtype == torch.bfloat16


@torch.no_grad()
def test_the_model_s_dtype_may_change_while_tokens_are_held() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    cache = PackedCache(model, calibration_of(model, recent=3))
    model(input_ids=IDS[:, :9], past_key_values=cache)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        model.to(dtype)
        found = model(input_ids=IDS[:, 9:10], past_key_values=cache).logits
        assert found.dtype == dtype
        assert torch.isfinite(found).all()
        assert cache.layers[0].sinks[0].dtype == cache.layers[0].recent[1].dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=IDS[:, 9:10], past_key_values=cache)
    model(input_ids=IDS[:, 9:10], past_key_values=cache)


@torch.no_grad()
def test_another_device_is_refused() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    cache = PackedCache(model, calibration_of(model))
    model(input_ids=IDS[:, :9], past_key_values=cache)
    with pytest.raises(RotqError, match=r"moved from cpu to meta .* call reset\(\)"):
        cache.layers[0]._follow(torch.empty(2, 2, 1, 16, device="meta"))


def test_what_autocast_means() -> None:
    single, double = torch.ones(2), torch.ones(2).double()
    assert lowered(single) is single
    with torch.autocast("cpu", dtype=torch.float16):
        assert lowered(single).dtype == torch.float16
        assert lowered(double) is double
        with switched_off(single.device):
            assert (single[:, None] @ single[None]).dtype == torch.float32
        assert (single[:, None] @ single[None]).dtype == torch.float16
