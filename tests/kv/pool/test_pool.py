"""Pools: the same attention as the caches they stand for, and shapes that never change."""

from typing import Any

import pytest
import torch
from tiny_served import calibration_of, served_model
from torch import Tensor
from transformers import DynamicCache

from rotq.errors import RotqError
from rotq.kv.cache.layout import together
from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.pool import dense
from rotq.kv.pool.dense import DensePool
from rotq.kv.pool.packed import PackedPool
from rotq.kv.pool.pool import PAGE_SIZE, Pool, Row, lay_out
from rotq.kv.presets import preset

FAMILIES = ["llama", "qwen3", "mistral", "gemma3"]


def ids_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 258, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: Any, pool: Pool, ids: Tensor, row: Row) -> Tensor:
    pool.plan([row], ids.shape[1])
    position = row.count + torch.arange(ids.shape[1])[None]
    logits: Tensor = model(input_ids=ids, position_ids=position, past_key_values=pool).logits[0]
    return logits


def packed(model: Any, calibration: Any, pages: int = 6) -> PackedPool:
    return PackedPool(model, calibration, num_pages=pages, num_sinks=2, table_width=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_pool_is_a_packed_cache(family: str) -> None:
    """Prompt in two passes, then tokens; pages in no order."""
    model = served_model(family)
    calibration = calibrate(model, ids_of(256), preset("k3v3"))
    pool, cache = packed(model, calibration), PackedCache(model, calibration)
    ids, count = ids_of(100, seed=1), 0
    for length in (68, 20, 1, 1, 1, 9):
        part = ids[:, count : count + length]
        row = Row(pages=[4, 1], sink=1, count=count, fresh=length)
        found = run(model, pool, part, row)
        with torch.no_grad():
            wanted = model(input_ids=part, past_key_values=cache).logits[0]
        # shapes differ, so roundings may, and a code may flip where it is near a threshold
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        count += length


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_pool_is_a_dynamic_cache(family: str) -> None:
    model = served_model(family)
    pool, cache = DensePool(model, num_pages=6, table_width=4), DynamicCache(config=model.config)
    ids, count = ids_of(100, seed=1), 0
    for length in (64, 30, 1, 1, 4):
        part = ids[:, count : count + length]
        found = run(model, pool, part, Row(pages=[5, 2], count=count, fresh=length))
        with torch.no_grad():
            wanted = model(input_ids=part, past_key_values=cache).logits[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        count += length


@pytest.mark.parametrize("kv", ["k3v3", "dense"])
def test_rows_do_not_touch_each_other(kv: str) -> None:
    """Bitwise: a row beside others, and alone with padding."""
    model = served_model()

    def pool() -> Pool:
        if kv == "dense":
            return DensePool(model, num_pages=6, table_width=4)
        return packed(model, calibration_of(model, kv))

    def steps(both: bool) -> Tensor:
        found, held = [], pool()
        other = Row(pages=[3, 4], sink=1, count=0, fresh=30 if both else 0)
        for count, fresh in ((0, 40), (40, 1), (41, 1)):
            ids = torch.zeros(2, 68 if fresh > 1 else 1, dtype=torch.int64)
            ids[0, :fresh] = ids_of(fresh, seed=count)[0]
            ids[1] = 7 if both else 0
            mine = Row(pages=[0, 2], sink=0, count=count, fresh=fresh)
            held.plan([mine, other], ids.shape[1])
            with torch.no_grad():
                logits = model(
                    input_ids=ids,
                    position_ids=torch.tensor([[count], [0]]) + torch.arange(ids.shape[1]),
                    past_key_values=held,
                ).logits
            found.append(logits[0, :fresh])
            other = Row(pages=[3, 4], sink=1, count=30, fresh=int(both))
        return torch.cat(found)

    assert torch.equal(steps(both=True), steps(both=False))


def test_layout_by_hand() -> None:
    rows = [Row(pages=[5, 3], sink=1, count=66, fresh=3), Row(count=1, fresh=4, pages=[2]), Row()]
    layout = lay_out(rows, 4, sinks=2, table_width=3)
    assert layout.query_position_BT.tolist() == [[66, 67, 68, -1], [1, 2, 3, 4], [-1] * 4]
    assert layout.page_table_BJ.tolist() == [[5, 3, 0], [2, 0, 0], [0, 0, 0]]
    assert layout.length_B.tolist() == [64, 0, 0]
    assert layout.dense_position_BN[:, :2].tolist() == [[0, 1], [0, -1], [-1, -1]]
    assert layout.dense_position_BN[:, 2:].tolist() == layout.query_position_BT.tolist()
    size = PAGE_SIZE
    assert layout.encode_slot_BE.tolist() == [
        [3 * size, 3 * size + 1, 3 * size + 2, -1],
        [-1, 2 * size, 2 * size + 1, 2 * size + 2],
        [-1] * 4,
    ]
    assert layout.sink_BTS is not None
    assert layout.sink_BTS.tolist() == [[1], [0], [1]]


@pytest.mark.parametrize("kv", ["k3v3", "k4v2", "dense"])
def test_cost_is_what_is_allocated(kv: str) -> None:
    model = served_model(dtype=torch.bfloat16)
    calibration = calibration_of(model, kv)
    if calibration is None:
        cost, pool = DensePool.cost(model), DensePool(model, num_pages=7, table_width=4)
        assert pool.nbytes == 7 * cost.page
        assert cost.page == PAGE_SIZE * cost.elements * 2
        return
    cost = PackedPool.cost(model, calibration)
    held = PackedPool(model, calibration, num_pages=7, num_sinks=3, table_width=4)
    assert held.nbytes == 7 * cost.page + 4 * cost.sinks


def test_what_cannot_be_served_is_refused() -> None:
    model = served_model()
    calibration = calibration_of(model, "k3v3")
    with pytest.raises(RotqError, match="another model"):
        packed(served_model("qwen3"), calibration)
    model.config.attn_logit_softcapping = 30.0
    with pytest.raises(RotqError, match="softcapping"):
        packed(model, calibration)
    model.config.use_bidirectional_attention = True
    with pytest.raises(RotqError, match="not causal"):
        DensePool(model, num_pages=1, table_width=1)


def test_a_pass_that_nobody_planned_is_our_bug() -> None:
    model = served_model()
    with pytest.raises(AssertionError, match="nobody planned"):
        model(input_ids=ids_of(3), past_key_values=DensePool(model, num_pages=1, table_width=1))


def test_a_failed_pass_leaves_a_pool_that_works() -> None:
    model = served_model()
    pool = packed(model, calibration_of(model, "k3v3"))
    row = Row(pages=[0], sink=0, count=0, fresh=5)
    wanted = run(model, pool, ids_of(5), row)
    last = model.model.layers[1].mlp
    forward = last.forward
    last.forward = lambda x: (_ for _ in ()).throw(MemoryError("no room"))
    with pytest.raises(MemoryError):
        run(model, pool, ids_of(5), row)
    last.forward = forward
    assert torch.equal(run(model, pool, ids_of(5), row), wanted)


def test_a_dense_pool_moves_places_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would wait for each layer's otherwise."""
    model, moved = served_model(), []
    pool = DensePool(model, num_pages=4, table_width=2)
    monkeypatch.setattr(dense, "together", lambda *given: moved.append(1) or together(*given))
    run(model, pool, ids_of(9), Row(pages=[1], fresh=9))
    assert len(pool.layers) > 1
    # of the fresh tokens, and of the one row
    assert len(moved) == 2
