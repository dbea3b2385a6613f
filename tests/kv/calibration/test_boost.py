"""Factors of decoded rows: they take out what coding shrinks, and follow the bits."""

from dataclasses import replace

import pytest
import torch
from tiny_models import random_ids, tiny_model

from rotq.kv.calibration.boost import KEY_POWER, VALUE_POWER, boosted
from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.calibration.codebook import gaussian_codebook
from rotq.kv.calibration.layer_constants import (
    hadamard_basis,
    recoded,
    recoded_side,
    side_constants,
)
from rotq.kv.presets import preset
from rotq.ops import SideConstants, dequantize_side, quantize_side

H, D = 2, 32
X_HND = torch.randn(H, 400, D, generator=torch.Generator().manual_seed(0))


def plain_side(bits: int = 2) -> SideConstants:
    basis_HDD, base_H = hadamard_basis(D).expand(H, -1, -1), torch.full((H,), -10.0)
    books = [gaussian_codebook(bits)] * H
    return side_constants(basis_HDD, torch.zeros(H, D), books, gain="lsq", base_H=base_H)


def slopes(side: SideConstants, bits: int) -> torch.Tensor:
    codes, stored = quantize_side(X_HND[None], side, bits, "log8")
    back_HND = dequantize_side(codes, stored, side, bits)[0]
    return (X_HND * back_HND).sum((1, 2)) / X_HND.square().sum((1, 2))


@pytest.mark.parametrize("bits", [2, 3])
def test_power_1_leaves_no_bias(bits: int) -> None:
    side = boosted(plain_side(bits), X_HND, None, bits=bits, power=1.0, weight=1.0)
    assert bool((slopes(plain_side(bits), bits) < 0.98).all())
    assert torch.allclose(slopes(side, bits), torch.ones(H), atol=1e-3)
    other = 5 - bits
    assert torch.allclose(slopes(recoded_side(side, bits, other), other), torch.ones(H), atol=1e-3)
    assert torch.allclose(recoded_side(side, bits, 8).inverse_HDD, plain_side().inverse_HDD)


def test_a_text_that_says_nothing_leaves_rows_as_they_are() -> None:
    side = boosted(plain_side(), X_HND, None, bits=2, power=1.5, weight=0.0)
    assert torch.equal(side.inverse_HDD, plain_side().inverse_HDD)


def test_zeros_have_no_factor() -> None:
    side = boosted(plain_side(), 0 * X_HND, None, bits=2, power=1.5, weight=1.0)
    assert side.boost_HC is not None
    assert torch.equal(side.boost_HC, torch.ones(H, 3))


def test_a_scheme_says_whether_it_has_factors() -> None:
    model, ids_BT = tiny_model("llama", dtype=torch.float32), random_ids(4, 64)
    spec = preset("k2v2")
    found = calibrate(model, ids_BT, spec, on_note=lambda _: None).layers[0]
    key_HC, value_HC = found.key.boost_HC, found.value.boost_HC
    assert key_HC is not None
    assert value_HC is not None
    # white noise through the same codes: the larger power has the larger factor
    assert VALUE_POWER > KEY_POWER
    assert float(value_HC[:, 0].mean()) > float(key_HC[:, 0].mean()) > 1
    for change in ({"boost": False}, {"residual": "sign"}):
        plain = calibrate(model, ids_BT, replace(spec, **change), on_note=lambda _: None)
        assert plain.layers[0].value.boost_HC is None
    there_and_back = recoded(recoded(found, 3, 4), 2, 2).value.inverse_HDD
    assert torch.allclose(there_and_back, found.value.inverse_HDD)
