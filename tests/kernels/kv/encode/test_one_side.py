"""Codes, norms, means and residual bits of one side: known values and what they must satisfy."""

import math

import pytest
import torch
from kv_cases import side_of, tokens_of, transform_of

from rotq_kernels.kv.encode.one_side import (
    dequantize_residual,
    dequantize_side,
    key_mean,
    quantize_residual,
    quantize_side,
    turned_mean,
)
from rotq_kernels.kv.format import KVFormat, SideConstants


def plain_side(gain: str = "lsq", base: float = -8.0) -> SideConstants:
    """Two bits, no rotation, thresholds -1, 0, 1."""
    return SideConstants(
        matrix_HDD=torch.eye(8)[None],
        inverse_HDD=torch.eye(8)[None],
        mean_HD=torch.zeros(1, 8),
        levels_HL=torch.tensor([[-3, -1, 1, 3]], dtype=torch.int8),
        thresholds_HL=torch.tensor([[-1.0, 0.0, 1.0]]),
        base_H=torch.tensor([base]),
        gain=gain,  # type: ignore[arg-type]
        unit_H=torch.tensor([0.5]),
    )


# rms 2, so that 2 and -2 lie on thresholds and belong below them, as does 0
ROW = [2.0, -2.0, 4.0, -2.0, 0.0, -0.0, 0.0, -2.0]
CODES = [2, 0, 3, 0, 1, 1, 1, 0]
# <y, L> = 2 + 6 + 12 + 6 + 6 = 32, <L, L> = 1 + 4 * 9 + 3 = 40, |y|^2 = 32
SCALES = {"lsq": 32 / 40, "norm": math.sqrt(32 / 40), "none": 1.0}


@pytest.mark.parametrize("gain", SCALES)
def test_known_row(gain: str) -> None:
    side = plain_side(gain)
    x_BHTD = torch.tensor(ROW)[None, None, None]
    codes, norm = quantize_side(x_BHTD, side, 2, "float16")
    assert codes.dtype == torch.uint8
    assert codes.flatten().tolist() == CODES
    assert norm is not None
    assert norm.dtype == torch.float16
    assert norm.item() == torch.tensor(SCALES[gain]).half().item()
    codes, norm = quantize_side(x_BHTD, side, 2, "log8")
    assert norm is not None
    assert norm.item() == round((math.log2(SCALES[gain]) + 8) * 16)


def test_without_norm_thresholds_are_absolute() -> None:
    x_BHTD = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 9.0])[None, None, None]
    side = plain_side(base=1.0)
    codes, norm = quantize_side(x_BHTD, side, 2, "none")
    assert norm is None
    assert codes.flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    back = dequantize_side(codes, None, side, 2)
    assert back.flatten().tolist() == [-6, -6, -2, -2, 2, 2, 6, 6]


@pytest.mark.parametrize("gain", SCALES)
def test_rows_of_zeros(gain: str) -> None:
    codes, norm = quantize_side(torch.zeros(1, 1, 1, 8), plain_side(gain), 2, "float16")
    assert codes.eq(1).all()
    assert norm is not None
    assert norm.item() == 0


# mean squared error of Lloyd-Max codebooks for the unit normal (kv.md 1.1), uniform above 4 bits
EXPECTED_MSE = {2: 0.1175, 3: 0.0346, 4: 0.0095, 5: 0.0035, 6: 0.00104, 7: 0.0003, 8: 0.00009}


@pytest.mark.parametrize("bits", EXPECTED_MSE)
def test_error_is_that_of_the_codebook(bits: int) -> None:
    side = side_of(2, 64, bits, seed=0)
    y_BHTD = torch.randn(1, 2, 500, 64, generator=torch.Generator().manual_seed(1))
    x_BHTD = y_BHTD @ side.inverse_HDD.mT
    codes, norm = quantize_side(x_BHTD, side, bits, "float16")
    y_back = dequantize_side(codes, norm, side, bits) @ side.matrix_HDD.mT
    error = ((y_back - y_BHTD).square().mean() / y_BHTD.square().mean()).item()
    assert error == pytest.approx(EXPECTED_MSE[bits], rel=0.15)


def test_least_squares_gain_is_the_best_one() -> None:
    side = plain_side()
    x_BHTD = torch.randn(1, 1, 50, 8, generator=torch.Generator().manual_seed(0))
    codes, norm = quantize_side(x_BHTD, side, 2, "float16")
    assert norm is not None

    def error(factor: float) -> torch.Tensor:
        scaled = (norm.float() * factor)[..., None] * torch.tensor([-3.0, -1, 1, 3])[codes.int()]
        return (scaled - x_BHTD).square().sum(-1)

    assert (error(1.0) <= error(1.01)).all()
    assert (error(1.0) <= error(0.99)).all()


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """As transformers' apply_rotary_pos_emb has it."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


@pytest.mark.parametrize("rotary_pairs", [32, 16])
def test_turned_mean_is_rope(rotary_pairs: int) -> None:
    mean_HD = torch.randn(3, 64, dtype=torch.float64)
    position_BT = torch.tensor([[0, 1, 2, 1000], [7, 8, 9, 100_000]])
    inv_freq_R = 10000.0 ** (-torch.arange(rotary_pairs, dtype=torch.float64) / rotary_pairs)
    found = turned_mean(mean_HD, position_BT, inv_freq_R, 1.5, torch.float64)
    angle_BTR = position_BT[..., None] * inv_freq_R
    cos, sin = (
        f(torch.cat([angle_BTR, angle_BTR], -1))[:, None] * 1.5 for f in (torch.cos, torch.sin)
    )
    rotary, rest = mean_HD[:, None].split([2 * rotary_pairs, 64 - 2 * rotary_pairs], -1)
    expected = rotary * cos + rotate_half(rotary) * sin
    assert torch.allclose(found[..., : 2 * rotary_pairs], expected, rtol=0, atol=1e-12)
    assert torch.equal(found[..., 2 * rotary_pairs :], rest.expand(2, 3, 4, -1))


def test_key_mean_by_mode() -> None:
    form = KVFormat(head_dim=64, k_bits=3, v_bits=3)
    position_BT = torch.arange(5)[None]
    for mode in ("none", "static", "rope"):
        transform = transform_of(form, 2, mean=mode)
        transform.key.mean_HD += 1
        mean = key_mean(transform, position_BT)
        if mode == "none":
            assert mean.eq(0).all()
        if mode == "static":
            assert torch.equal(mean[0, :, 0], transform.key.mean_HD)
        if mode == "rope":
            assert mean.shape == (1, 2, 5, 64)
            # at position 0 only the attention factor is left
            assert torch.allclose(mean[0, :, 0], 1.1 * transform.key.mean_HD)


@pytest.mark.parametrize("residual", ["sign", "qjl"])
@pytest.mark.parametrize("norm", ["log8", "float16", "none"])
def test_residual_bits_lower_the_error(residual: str, norm: str) -> None:
    form = KVFormat(head_dim=64, k_bits=2, v_bits=3, residual=residual, norm=norm)  # type: ignore[arg-type]
    transform = transform_of(form, 2, mean="none")
    if residual == "qjl" and norm == "none":
        assert transform.gamma_base_H is not None
        transform.gamma_base_H.fill_(math.log2(0.34))
    x_BHTD, _ = tokens_of(transform, 1, 200)
    x_BHTD = x_BHTD @ transform.key.inverse_HDD.mT
    codes, stored = quantize_side(x_BHTD, transform.key, 2, form.norm)
    sign, gamma = quantize_residual(x_BHTD, codes, stored, transform)
    assert (gamma is not None) == (residual == "qjl" and norm != "none")
    added = dequantize_residual(sign, stored, gamma, transform)

    def error(residual_BHTD: torch.Tensor | None) -> float:
        back = dequantize_side(codes, stored, transform.key, 2, residual_BHTD=residual_BHTD)
        return ((back - x_BHTD) @ transform.key.matrix_HDD.mT).square().mean().item()

    # elementwise the bit is worth less than in a fresh basis, where it is 1 - 2 / pi
    assert error(added) < (0.45 if residual == "qjl" else 0.5) * error(None)


def test_shapes_of_norms_and_dtypes() -> None:
    side = side_of(3, 64, 3, seed=0)
    codes, norm = quantize_side(torch.randn(2, 3, 4, 64).bfloat16(), side, 3, "log8")
    assert norm is not None
    assert (norm.shape, norm.dtype) == ((2, 3, 4), torch.uint8)
    back = dequantize_side(codes, norm, side, 3, dtype=torch.float64)
    assert back.dtype == torch.float64
    assert torch.allclose(back.float(), dequantize_side(codes, norm, side, 3), atol=1e-5)
