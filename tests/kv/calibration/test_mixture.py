"""The factor of decoded values: it is that of least squares over what attention makes of them."""

from dataclasses import replace

import pytest
import torch
from tiny_models import random_ids, tiny_model

from rotq.kv.calibration.calibrate import calibrate
from rotq.kv.calibration.codebook import gaussian_codebook
from rotq.kv.calibration.layer_constants import (
    hadamard_basis,
    recoded,
    recoded_side,
    side_constants,
)
from rotq.kv.calibration.mixture import Mixture, boosted
from rotq.kv.presets import preset
from rotq.ops import SideConstants, dequantize_side, quantize_side

H, D, T, SINKS = 2, 32, 192, 4
GENERATOR = torch.Generator().manual_seed(0)


def plain_side(bits: int = 2) -> SideConstants:
    book = gaussian_codebook(bits)
    return side_constants(
        hadamard_basis(D).expand(H, -1, -1), torch.zeros(H, D), [book] * H, gain="lsq",
        base_H=torch.full((H,), -10.0),
    )  # fmt: skip


def attention(wide: float) -> torch.Tensor:
    """Probabilities (1, H, 1, T, T), causal; the wider the more tokens count."""
    score = torch.randn(1, H, 1, T, T, generator=GENERATOR) / wide
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    return score.masked_fill(~seen, -torch.inf).softmax(-1)


@pytest.mark.parametrize(("wide", "low", "high"), [(100.0, 1.0, 1.25), (0.02, 1.0, 1.01)])
def test_factor_is_that_of_least_squares(wide: float, low: float, high: float) -> None:
    v_BHTD = torch.randn(1, H, T, D, generator=GENERATOR) + 0.15
    mean_HD = torch.full((H, D), 0.1)
    p, mixture = attention(wide), Mixture.empty(H, D)
    for first in (0, 64, 128):
        part = p[..., first : first + 64, : first + 64]
        mixture.add(part, v_BHTD[:, :, : first + 64], first, SINKS)
    c_BHTD = v_BHTD - mean_HD[:, None]
    side = boosted(plain_side(), c_BHTD[0], mean_HD, None, mixture, 2, 1.0)
    assert side.boost_HC is not None
    codes, stored = quantize_side(c_BHTD, plain_side(), 2, "log8")
    back_BHTD = dequantize_side(codes, stored, plain_side(), 2)
    seen = p.tril(-1).squeeze(2)
    seen[..., :SINKS] = 0
    exact, found = seen @ c_BHTD, seen @ back_BHTD
    best_H = (exact * found).sum((0, 2, 3)) / found.square().sum((0, 2, 3))
    assert torch.allclose(side.boost_HC[:, 0], best_H.clamp(low, high), rtol=0.02)
    twice = dequantize_side(codes, stored, side, 2)
    assert torch.allclose(twice, side.boost_HC[:, 0, None, None] * back_BHTD, atol=1e-6)


def test_fewer_bits_have_larger_factors() -> None:
    mixture = Mixture.empty(H, D)
    mixture.add(attention(100.0), torch.randn(1, H, T, D, generator=GENERATOR) + 0.5, 0, SINKS)
    x_HND = torch.randn(H, 256, D, generator=GENERATOR)
    side = boosted(plain_side(), x_HND, torch.zeros(H, D), None, mixture, 2, 1.0)
    assert side.boost_HC is not None
    assert bool((side.boost_HC.diff(dim=1) < 0).all())
    none = boosted(plain_side(), x_HND, torch.zeros(H, D), None, mixture, 2, 0.0)
    assert torch.equal(none.inverse_HDD, plain_side().inverse_HDD)
    three = recoded_side(side, 2, 3).inverse_HDD
    ratio_H11 = (side.boost_HC[:, 1] / side.boost_HC[:, 0])[:, None, None]
    assert torch.allclose(three, side.inverse_HDD * ratio_H11)
    assert torch.allclose(recoded_side(side, 2, 8).inverse_HDD, plain_side().inverse_HDD)


def test_a_scheme_says_whether_values_have_one() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    ids_BT, spec = random_ids(4, 64), preset("k2v2")
    found = calibrate(model, ids_BT, spec, on_note=lambda _: None).layers[0]
    assert found.value.boost_HC is not None
    assert found.key.boost_HC is None
    plain = calibrate(model, ids_BT, replace(spec, value_boost=False), on_note=lambda _: None)
    assert plain.layers[0].value.boost_HC is None
    there_and_back = recoded(recoded(found, 3, 4), 2, 2).value.inverse_HDD
    assert torch.allclose(there_and_back, found.value.inverse_HDD)
