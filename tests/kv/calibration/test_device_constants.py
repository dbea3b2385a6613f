"""Constants are made once for all who use them, and let go with their calibration."""

import gc
import weakref
from dataclasses import replace

import torch
from kv_cases import transform_of
from kv_oracle import calibration_with

from rotq.kv.codec import KVCodec
from rotq.ops import KVFormat

FORM = KVFormat(head_dim=16, k_bits=3, v_bits=4, page_size=16)
CPU, META = torch.device("cpu"), torch.device("meta")


def test_other_device() -> None:
    given = transform_of(FORM, 2)
    calibration = calibration_with(given)
    assert calibration.on(CPU).layer(0) is given
    moved = calibration.on(META).layer(0)
    assert moved.key.matrix_HDD.device == moved.inv_freq_R.device == META  # type: ignore[union-attr]
    assert moved.format == given.format
    assert calibration.on(META).layer(0) is moved
    assert calibration_with(replace(given)).on(META).layer(0) is not moved


def test_another_scheme_has_its_own() -> None:
    calibration = calibration_with(transform_of(FORM, 2))
    assert calibration.on(META) is not replace(calibration).on(META)


def test_stack_codes_as_each_does() -> None:
    transforms = [transform_of(FORM, 2, seed=seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(0)
    k_BHTD, v_BHTD = torch.randn(2, 2, 6, 5, 16, generator=generator)
    position_BT = torch.arange(5).expand(2, -1)
    stack = calibration_with(*transforms).on(CPU).stack([0, 1, 2])
    together = stack.encode(k_BHTD, v_BHTD, position_BT)
    for n, transform in enumerate(transforms):
        heads = slice(2 * n, 2 * n + 2)
        alone = KVCodec(transform).encode(k_BHTD[:, heads], v_BHTD[:, heads], position_BT)
        assert torch.equal(together.k_codes_BHTD[:, heads], alone.k_codes_BHTD)
        assert torch.equal(together.v_codes_BHTD[:, heads], alone.v_codes_BHTD)
        assert together.k_norm_BHT is not None
        assert alone.k_norm_BHT is not None
        assert torch.equal(together.k_norm_BHT[:, heads], alone.k_norm_BHT)


def test_stacks_are_let_go() -> None:
    calibration = calibration_with(*[transform_of(FORM, 2, seed=seed) for seed in range(3)])
    found = calibration.on(CPU).stack([0, 1, 2])
    assert calibration.on(CPU).stack((0, 1, 2)) is found
    assert calibration.on(CPU).stack([0, 1]) is not found
    gone = weakref.ref(found)
    del found
    gc.collect()
    assert gone() is not None
    del calibration
    gc.collect()
    assert gone() is None
