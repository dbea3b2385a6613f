"""What a decode step launches on a GPU, counted on a CPU; and that it never waits for one."""

from collections import Counter

import torch
from kv_oracle import calibration_of
from specializations import Variants
from stubbed_step import WAITING, Log, counted_step, stubbed
from tiny_models import random_ids, tiny_model

from rotq.kv.cache.packed_cache import PackedCache
from rotq.kv.pool.packed import PackedPool
from rotq.kv.pool.pool import Row

MODEL = tiny_model("llama", dtype=torch.float32)
IDS = random_ids(2, 40)
LAYERS = 2


@torch.no_grad()
def test_a_step_of_a_cache() -> None:
    cache = PackedCache(MODEL, calibration_of(MODEL))
    MODEL(input_ids=IDS[:, :38], past_key_values=cache)
    # what is made once is made now
    counted_step(MODEL, cache, lambda: MODEL(input_ids=IDS[:, 38:39], past_key_values=cache))
    counts = counted_step(MODEL, cache, lambda: MODEL(input_ids=IDS[:, 39:], past_key_values=cache))
    kernels = {"turn_kernel": LAYERS, "decode_kernel": LAYERS, "merge_kernel": LAYERS}
    assert {name: counts.layers[name] for name in kernels} == kernels
    assert counts.layers.total() <= 6 * LAYERS, counts.layers
    # one launch for the keys of all layers, one for the values
    assert counts.end["encode_kernel"] == 2
    assert not WAITING & {*counts.layers, *counts.end}


@torch.no_grad()
def test_nothing_is_compiled_in_mid_text() -> None:
    """The first step has met what later ones meet, from the first page to the third."""
    cache, variants = PackedCache(MODEL, calibration_of(MODEL)), Variants()
    with stubbed(Counter(), variants.note):
        for length in (3, 1):
            MODEL(input_ids=IDS[:1, :length], past_key_values=cache)
        first = variants.counts()
        for _ in range(34):
            MODEL(input_ids=IDS[:1, :1], past_key_values=cache)
    assert variants.counts() == first
    # keys and values; the prompt has more rows, and pages that are not in one memory yet
    assert first == {"turn_kernel": 1, "decode_kernel": 2, "merge_kernel": 2, "encode_kernel": 2}


@torch.no_grad()
def test_a_step_of_a_pool() -> None:
    calibration = calibration_of(MODEL, page_size=64)
    pool = PackedPool(MODEL, calibration, num_pages=4, num_sinks=2, table_width=2)

    def step(count: int, fresh: int) -> None:
        row = Row(pages=[2, 1], sink=1, count=count, fresh=fresh)
        ids, position = IDS[:1, :fresh], torch.arange(count, count + fresh)[None]
        pool.plan([row], fresh)
        MODEL(input_ids=ids, position_ids=position, past_key_values=pool)

    step(0, 20)
    counted_step(MODEL, pool, lambda: step(20, 1))
    counts = counted_step(MODEL, pool, lambda: step(21, 1))
    assert counts.layers["decode_kernel"] == LAYERS
    assert counts.layers.total() <= 7 * LAYERS, counts.layers
    assert not WAITING & {*counts.layers, *counts.end}, counts.end


def test_the_log_sees_what_waits() -> None:
    with Log() as log:
        torch.ones(3).sum().item()
        torch.ones(3).double()
    assert WAITING & {*log.found} == {"aten::_local_scalar_dense", "aten::_to_copy"}
