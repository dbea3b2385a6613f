"""Constants are made once for all who use them, and let go with the last."""

import gc
import weakref
from dataclasses import replace

import torch
from kv_cases import transform_of

from rotq.kv.calibration.constants import on, stack
from rotq.kv.codec import KVCodec
from rotq.ops import KVFormat

FORM = KVFormat(head_dim=16, k_bits=3, v_bits=4, page_size=16)


def test_other_device() -> None:
    given, meta = transform_of(FORM, 2), torch.device("meta")
    assert on(torch.device("cpu"), given) is given
    moved = on(meta, given)
    assert moved.key.matrix_HDD.device == moved.inv_freq_R.device == meta  # type: ignore[union-attr]
    assert moved.format == given.format
    assert on(meta, given) is moved
    assert on(meta, replace(given)) is not moved


def test_stack_codes_as_each_does() -> None:
    transforms = [transform_of(FORM, 2, seed=seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    k_BHTD, v_BHTD = torch.randn(2, 2, 6, 5, 16, generator=generator)
    position_BT = torch.arange(5).expand(2, -1)
    together = stack(transforms).codec.encode(k_BHTD, v_BHTD, position_BT)
    for n, transform in enumerate(transforms):
        heads = slice(2 * n, 2 * n + 2)
        alone = KVCodec(transform).encode(k_BHTD[:, heads], v_BHTD[:, heads], position_BT)
        assert torch.equal(together.k_codes_BHTD[:, heads], alone.k_codes_BHTD)
        assert torch.equal(together.v_codes_BHTD[:, heads], alone.v_codes_BHTD)
        assert together.k_norm_BHT is not None
        assert alone.k_norm_BHT is not None
        assert torch.equal(together.k_norm_BHT[:, heads], alone.k_norm_BHT)


def test_stacks_are_let_go() -> None:
    transforms = [transform_of(FORM, 2, seed=seed) for seed in range(3)]
    found = stack(transforms)
    assert stack(list(transforms)) is found
    assert stack(transforms[:2]) is not found
    gone = weakref.ref(found)
    del found
    gc.collect()
    assert gone() is None
