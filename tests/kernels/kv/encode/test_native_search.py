"""Native code's search against the one in plain PyTorch, which is tested on its own."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rotq_kernels.kv.encode import native_search, one_side
from rotq_kernels.kv.encode.native_search import search_codes_native, searches_rows_natively
from rotq_kernels.kv.encode.one_side import dequantize_side, quantize_side
from rotq_kernels.kv.format import SideConstants, level_values

pytest.importorskip("numba")

Plain = Callable[..., tuple[Tensor, Tensor | None]]
HEADS, STEPS = 3, 4
LEVELS = {2: [-5, -1, 2, 6], 3: [-9, -6, -4, -1, 1, 3, 6, 11], 4: list(range(-8, 8))}
"""Uneven ones, of which a search that knew but one distance would take wrong ones."""


def side_with(bits: int, width: int) -> SideConstants:
    draw = torch.Generator().manual_seed(bits)
    basis_HDD = torch.linalg.qr(torch.randn(HEADS, width, width, generator=draw)).Q
    wide_HD = torch.exp(1.5 * torch.randn(HEADS, width, generator=draw))
    levels_HL = torch.tensor(LEVELS[bits], dtype=torch.int8).expand(HEADS, -1)
    unit_H = 2.2 / levels_HL.float().amax(1) * torch.tensor([1.0, 0.9, 1.2])
    value_HL = levels_HL.float() * unit_H[:, None]
    return SideConstants(
        matrix_HDD=torch.linalg.qr(torch.randn(HEADS, width, width, generator=draw)).Q,
        inverse_HDD=torch.empty(0),
        mean_HD=torch.zeros(HEADS, width),
        levels_HL=levels_HL,
        thresholds_HL=(value_HL[:, 1:] + value_HL[:, :-1]) / 2,
        base_H=torch.full((HEADS,), -12.0),
        unit_H=unit_H,
        metric_HDD=(basis_HDD * wide_HD[:, None]) @ basis_HDD.mT,
        search=STEPS,
    )


def tokens(width: int, batch: int = 2, length: int = 40) -> Tensor:
    return torch.randn(batch, HEADS, length, width, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Plain:
    """``quantize_side`` without native code."""

    def quantized(*given: Any) -> tuple[Tensor, Tensor | None]:
        with monkeypatch.context() as within:
            within.setattr(one_side, "searches_rows_natively", lambda y_BHTD: False)
            return quantize_side(*given)

    return quantized


@pytest.mark.parametrize("width", [24, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_and_norms_are_those_of_plain_pytorch(bits: int, width: int, plain: Plain) -> None:
    side, x_BHTD = side_with(bits, width), tokens(width)
    codes, norm = quantize_side(x_BHTD, side, bits, "float16")
    plain_codes, plain_norm = plain(x_BHTD, side, bits, "float16")
    assert norm is not None
    assert plain_norm is not None
    # sums are in another order: a move may gain as much as another, to rounding
    same_BHT = (codes == plain_codes).all(-1)
    assert same_BHT.float().mean() > 0.99
    torch.testing.assert_close(norm[same_BHT], plain_norm[same_BHT], rtol=1e-3, atol=0)
    # and the search is not idle
    nearest, _ = quantize_side(x_BHTD, replace(side, search=0), bits, "float16")
    assert (codes != nearest).any(-1).float().mean() > 0.5


def test_what_differs_costs_the_same(plain: Plain) -> None:
    """On rows with two equal elements, whose moves are worth the same."""
    side = replace(side_with(3, 64), metric_HDD=torch.eye(64).expand(HEADS, -1, -1))
    side = replace(side, matrix_HDD=torch.eye(64).expand(HEADS, -1, -1))
    x_BHTD = tokens(64)
    x_BHTD[..., 1::2] = x_BHTD[..., ::2]
    costs = []
    for quantized in (quantize_side, plain):
        codes, norm = quantized(x_BHTD, side, 3, "float16")
        e_BHTD = (
            dequantize_side(codes, norm, replace(side, inverse_HDD=side.matrix_HDD), 3) - x_BHTD
        )
        costs.append(e_BHTD.double().square().sum(-1))
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-3, atol=0)


def test_a_row_does_not_know_of_the_others() -> None:
    side, y_BHTD = side_with(3, 64), tokens(64)
    codes = torch.zeros(y_BHTD.shape, dtype=torch.uint8)
    tables = (
        side.metric_HDD,
        side.unit_H,
        STEPS,
        side.thresholds_HL,
        level_values(side.levels_HL, 3),
    )
    together, scales = search_codes_native(y_BHTD, codes, *tables)
    alone, scale = search_codes_native(y_BHTD[1:, :, 7:8], codes[1:, :, 7:8], *tables)
    assert torch.equal(together[1:, :, 7:8], alone)
    assert torch.equal(scales[1:, :, 7:8], scale)
    assert not codes.any()


def test_threads_share_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    side, x_BHTD = side_with(3, 64), tokens(64, batch=3)
    codes, norm = quantize_side(x_BHTD, side, 3, "log8")
    monkeypatch.setattr(native_search, "SHARED", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    shared_codes, shared_norm = quantize_side(x_BHTD, side, 3, "log8")
    assert torch.equal(codes, shared_codes)
    assert norm is not None
    assert shared_norm is not None
    assert torch.equal(norm, shared_norm)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_rows_that_are_no_rows_get_the_norms_of_plain_pytorch(value: float, plain: Plain) -> None:
    side, x_BHTD = side_with(3, 64), tokens(64)
    x_BHTD[0, :, 3] = value
    _, norm = quantize_side(x_BHTD, side, 3, "log8")
    _, plain_norm = plain(x_BHTD, side, 3, "log8")
    assert norm is not None
    assert plain_norm is not None
    assert torch.equal(norm[0, :, 3], plain_norm[0, :, 3])
    assert int(norm[0, 0, 3]) == (0 if value == 0 else 255)


def test_other_widths_and_dtypes_are_plain_pytorch_s() -> None:
    assert searches_rows_natively(torch.zeros(1, 1, 1, 8))
    assert not searches_rows_natively(torch.zeros(1, 1, 1, 8, dtype=torch.float64))
    assert not searches_rows_natively(torch.zeros(1, 1, 1, 8, device="meta"))


def test_gradients_are_plain_pytorch_s() -> None:
    side, x_BHTD = side_with(3, 64), tokens(64).requires_grad_()
    assert not searches_rows_natively(x_BHTD)
    codes, _ = quantize_side(x_BHTD, side, 3, "float16")
    assert codes.shape == x_BHTD.shape


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_sequences_are_turned_as_they_are_alone(batch: int) -> None:
    side, x_BHTD = side_with(3, 64), tokens(64, batch)
    found = one_side.rotate(x_BHTD, side)
    assert found.shape == x_BHTD.shape
    for turned, alone in zip(found, x_BHTD, strict=True):
        assert torch.equal(turned, one_side.rotate(alone[None], side)[0])
