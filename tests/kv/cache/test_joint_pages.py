"""What a GPU's caches and pools do, on a CPU: all layers' pages in one memory, written at once."""

import copy
from typing import Any

import pytest
import torch
from kv_oracle import calibration_of
from tiny_models import random_ids, tiny_model
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.cache import batched_encoding
from rotq.kv.cache.layout import together
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.pool import packed
from rotq.kv.pool.packed import PackedPool
from rotq.kv.pool.pool import Row

MODEL = tiny_model("llama")
IDS = random_ids(2, 90)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (batched_encoding, packed):
        monkeypatch.setattr(module, "JOINED", ("cpu",))


def steps(cache: PackedCache, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of chunks of these sizes."""
    with torch.no_grad():
        return torch.cat(
            [MODEL(input_ids=part, past_key_values=cache).logits for part in ids.split(sizes, 1)], 1
        )


def stored(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in layer.pages.tensors()]


SIZES = [20, 1, 1, 16, 1, 17, *[1] * 34]


@pytest.mark.parametrize("name", ["k3v3", "turboquant", "turboesm"])
def test_codes_and_answers_are_those_of_separate_pages(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = calibration_of(MODEL, name=name)
    separate = PackedCache(MODEL, calibration)
    expected = steps(separate, IDS, SIZES)
    monkeypatch.setattr(batched_encoding, "JOINED", ("cpu",))
    joint = PackedCache(MODEL, calibration)
    assert torch.equal(steps(joint, IDS, SIZES), expected)
    for ours, theirs in zip(stored(joint), stored(separate), strict=True):
        assert torch.equal(ours, theirs)
    assert joint.report().packed == separate.report().packed
    if name != "turboesm":
        blocks = {layer.pages.k_codes.untyped_storage().data_ptr() for layer in joint.layers}
        assert len(blocks) == 1


@pytest.mark.usefixtures("joined")
def test_a_cache_is_copied_cropped_selected_and_begun_anew() -> None:
    cache = PackedCache(MODEL, calibration_of(MODEL))
    first = steps(cache, IDS[:, :40], [30, *[1] * 10])
    twin = copy.deepcopy(cache)
    expected = steps(cache, IDS[:, 40:50], [1] * 10)
    assert torch.equal(steps(twin, IDS[:, 40:50], [1] * 10), expected)
    cache.crop(-10)
    assert torch.equal(steps(cache, IDS[:, 40:50], [1] * 10), expected)
    cache.crop(-10)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(steps(cache, IDS[[1, 0], 40:50], [1] * 10), expected[[1, 0]])
    cache.reset()
    assert torch.equal(steps(cache, IDS[:, :40], [30, *[1] * 10]), first)


def test_a_pool_s_answers_are_those_of_separate_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, found = calibration_of(MODEL, page_size=64), []
    for devices in ((), ("cpu",)):
        for module in (batched_encoding, packed):
            monkeypatch.setattr(module, "JOINED", devices)
        pool = PackedPool(MODEL, calibration, num_pages=4, num_sinks=2, table_width=2)
        blocks = {layer.pages.k_codes.untyped_storage().data_ptr() for layer in pool.layers}
        assert len(blocks) == (1 if devices else len(pool.layers))
        logits, count = [], 0
        for part in IDS[:1, :73].split([70, 1, 1, 1], 1):
            row = Row(pages=[2, 1], sink=1, count=count, fresh=part.shape[1])
            pool.plan([row], part.shape[1])
            position = torch.arange(count, count + part.shape[1])[None]
            with torch.no_grad():
                logits.append(
                    MODEL(input_ids=part, position_ids=position, past_key_values=pool).logits
                )
            count += part.shape[1]
        found.append((torch.cat(logits, 1), stored(pool)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.usefixtures("joined")
def test_what_is_not_finite_is_refused() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    cache = PackedCache(model, calibration_of(model))
    with torch.no_grad():
        model(input_ids=IDS[:, :20], past_key_values=cache)
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
        with pytest.raises(RotqError, match="not finite"):
            model(input_ids=IDS[:, 20:21], past_key_values=cache)


def test_tensors_that_are_moved_together() -> None:
    given = [
        torch.arange(5, dtype=torch.int32),
        torch.tensor([[1, -2]]),
        torch.zeros(3, 0, dtype=torch.int64),
        torch.arange(12).view(3, 4).mT,
        torch.tensor([True, False, True]),
    ]
    found = together(given, torch.device("cpu"))
    for ours, theirs in zip(found, given, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 1
    assert together([], torch.device("cpu")) == []
