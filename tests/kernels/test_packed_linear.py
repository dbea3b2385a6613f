"""packed_linear: bitwise against the dense weight where nothing rounds, else against fp64.

Without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rotq_kernels import launching
from rotq_kernels import packed_linear as kernels
from rotq_kernels.layout import pack
from rotq_kernels.packed_linear import (
    _op,
    dequantize_reference,
    packed_linear,
    packed_linear_cpu,
    packed_linear_reference,
    packed_linear_triton,
)

ALL_BITS = range(2, 9)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Packed = tuple[Tensor, Tensor, Tensor | None]


def random_packed(
    N: int,
    K: int,
    G: int,
    bits: int,
    *,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> Packed:
    """Words, scales and zero points; weights of about 0.02, as in language models."""
    generator = torch.Generator().manual_seed(N + K)
    half = 2 ** (bits - 1)

    def codes(columns: int) -> Tensor:
        return torch.randint(-half, half, (N, columns), generator=generator, dtype=torch.int8)

    scale_NG = ((torch.rand(N, G, generator=generator) + 0.5) * 0.03 / half).to(scale_dtype)
    zero_WG = None if symmetric else pack(codes(G), bits, dim=0).to(DEVICE)
    return pack(codes(K), bits).to(DEVICE), scale_NG.to(DEVICE), zero_WG


def random_rows(M: int, K: int, dtype: torch.dtype) -> Tensor:
    x_MK = torch.randn(M, K, generator=torch.Generator().manual_seed(M))
    return x_MK.to(DEVICE, dtype)


def assert_no_worse(actual: Tensor, baseline: Tensor, oracle: Tensor) -> None:
    def worst(y_MN: Tensor) -> float:
        return (y_MN.double() - oracle).abs().max().item()

    ours, theirs = worst(actual), worst(baseline)
    assert ours <= 2 * theirs + 1e-6, f"max error {ours:.3e}; the baseline's is {theirs:.3e}"


def check(x_MK: Tensor, packed: Packed, bias_N: Tensor | None, bits: int) -> None:
    """The kernel against PyTorch on the dense weight, both against fp64."""
    exact_NK = dequantize_reference(*packed, x_MK.shape[1], bits, torch.float64)
    wide_N = None if bias_N is None else bias_N.double()
    narrow_N = None if bias_N is None else bias_N.to(x_MK.dtype)
    baseline = F.linear(x_MK, exact_NK.to(x_MK.dtype), narrow_N)
    actual = packed_linear_triton(x_MK, *packed, bias_N, bits)
    assert actual.dtype == x_MK.dtype
    assert_no_worse(actual, baseline, F.linear(x_MK.double(), exact_NK, wide_N))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_unit_vectors_give_the_weight(bits: int, symmetric: bool) -> None:
    """Every code at every place of a chunk, bitwise, by the GEMM."""
    packed = random_packed(19, 40, 5, bits, symmetric=symmetric)
    y_KN = packed_linear_triton(torch.eye(40, device=DEVICE), *packed, None, bits)
    assert torch.equal(y_KN, dequantize_reference(*packed, 40, bits).T)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("M", [1, 2])
def test_exact_sums(M: int, bits: int, symmetric: bool) -> None:
    """Integers and scales of powers of two round nowhere: bitwise, by the GEMV."""
    words_NW, scale_NG, zero_WG = random_packed(7, 160, 5, bits, symmetric=symmetric)
    scale_NG = scale_NG.float().log2().round().exp2()
    x_MK = (8 * random_rows(M, 160, torch.float32)).round()
    exact_NK = dequantize_reference(words_NW, scale_NG, zero_WG, 160, bits, torch.float64)
    actual = packed_linear_triton(x_MK, words_NW, scale_NG, zero_WG, None, bits)
    assert torch.equal(actual.double(), F.linear(x_MK.double(), exact_NK))


def test_known_result() -> None:
    """Written by hand: codes 1 2 3 -4 of 3 bits, zero point -1, scale 1/2, bias 10."""
    words_NW = torch.tensor([[0b000_111_110_101]], dtype=torch.int32, device=DEVICE)
    zero_WG = torch.tensor([[0b011]], dtype=torch.int32, device=DEVICE)
    scale_NG = torch.tensor([[0.5]], device=DEVICE)
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]], device=DEVICE)
    bias_N = torch.tensor([10.0], device=DEVICE)
    # 10 + (1 * 2 + 10 * 3 + 100 * 4 - 1000 * 3) / 2
    for op in (packed_linear_triton, packed_linear_reference):
        assert op(x, words_NW, scale_NG, zero_WG, bias_N, 3).tolist() == [[-1274.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K", "G"),
    [
        (1, 9, 576, 1),
        (2, 5, 1536, 12),
        (1, 3, 1120, 10),
        (5, 64, 320, 10),
        (17, 65, 480, 10),
        (67, 130, 192, 3),
    ],
    ids=str,
)
def test_shapes(M: int, N: int, K: int, G: int, dtype: torch.dtype) -> None:
    packed = random_packed(N, K, G, 3)
    check(random_rows(M, K, dtype), packed, random_rows(1, N, dtype)[0], 3)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("M", [1, 6], ids=["gemv", "gemm"])
def test_bits(M: int, bits: int) -> None:
    packed = random_packed(6, 640, 5, bits, scale_dtype=torch.bfloat16)
    check(random_rows(M, 640, torch.bfloat16), packed, None, bits)


@pytest.mark.parametrize(("K", "G"), [(42, 1), (42, 3), (96, 2), (40, 5), (72, 3), (30, 10)])
@pytest.mark.parametrize("M", [1, 6], ids=["gemv", "gemm"])
def test_groups_of_any_size(M: int, K: int, G: int) -> None:
    """Groups that no power of two divides, and rows that end inside a word."""
    packed = random_packed(6, K, G, 5, scale_dtype=torch.float32)
    check(random_rows(M, K, torch.float32), packed, None, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("M", "K", "G"), [(3, 160, 5), (9, 224, 1), (16, 512, 4)])
def test_columns_that_are_shared_out(
    M: int, K: int, G: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of columns that need not divide their number, with zero points and a bias."""
    grids: list[tuple[int, ...]] = []

    def launch(kernel: Any, grid: tuple[int, ...], *given: Any, **named: Any) -> None:
        grids.append(grid)
        launching.launch(kernel, grid, *given, **named)

    monkeypatch.setattr(kernels, "LEAST_RUN", 32)
    monkeypatch.setattr(kernels, "launch", launch)
    bias_N = torch.randn(40, device=DEVICE)
    check(random_rows(M, K, dtype), random_packed(40, K, G, 3), bias_N, 3)
    assert grids[0][2] > 1


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_many_rows_take_a_dense_weight(bits: int, symmetric: bool) -> None:
    packed = random_packed(70, 96, 3, bits, symmetric=symmetric)
    bias_N = torch.randn(70, device=DEVICE)
    check(random_rows(kernels.DENSE_ROWS, 96, torch.float16), packed, bias_N, bits)


def test_row_past_the_last_is_not_read() -> None:
    """Words, scales and zero points beyond the last row and column are poison."""
    wide = random_packed(32, 64, 2, 3)
    packed_NW = wide[0][:20, :3]
    x_MK = random_rows(3, 32, torch.float32)
    scale_NG = wide[1][:20, :1]
    check(x_MK, (packed_NW, scale_NG, None), None, 3)
    buffer = torch.full((2, 66), torch.nan, device=DEVICE)
    buffer[:, :32] = x_MK[:2]
    check(buffer[:, :32], (packed_NW, scale_NG, None), None, 3)


LAYOUTS = ["contiguous", "rows of a wider buffer", "transposed", "every second"]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers; what lies between them is the largest there is."""
    M, K = x.shape
    worst = torch.iinfo(x.dtype).max if x.dtype == torch.int32 else torch.nan
    if layout == "rows of a wider buffer":
        buffer = x.new_full((M, K + 5), worst)
        view = buffer[:, 3 : 3 + K]
    elif layout == "transposed":
        view = x.new_full((K, M), worst).T
    elif layout == "every second":
        view = x.new_full((2 * M, K), worst)[::2]
    else:
        view = x.new_full((M, K), worst)
    view.copy_(x)
    return view


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M", [2, 9], ids=["gemv", "gemm"])
def test_layouts(M: int, layout: str) -> None:
    packed = random_packed(20, 96, 3, 3)
    x_MK = random_rows(M, 96, torch.float32)
    expected = packed_linear_triton(x_MK, *packed, None, 3)
    strided = [laid_out(tensor, layout) for tensor in packed if tensor is not None]
    assert torch.equal(packed_linear_triton(laid_out(x_MK, layout), *strided, None, 3), expected)


@pytest.mark.parametrize(
    ("symmetric", "layout"), [*((False, layout) for layout in LAYOUTS), (True, "contiguous")]
)
def test_op_is_registered_right(symmetric: bool, layout: str) -> None:
    words_NW, scale_NG, zero_WG = random_packed(12, 64, 2, 3, symmetric=symmetric)
    x_MK = laid_out(random_rows(3, 64, torch.float32), layout).requires_grad_()
    bias_N = None if symmetric else torch.ones(12, device=DEVICE)
    torch.library.opcheck(_op, (x_MK, words_NW, scale_NG, zero_WG, bias_N, 3))


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_a_cpu_unpacks_some_rows_at_a_time(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 rows of 150; zero points are packed along the rows."""
    monkeypatch.setattr("rotq_kernels.packed_linear.CPU_TILE", 64 * 48)
    packed, bias_N = random_packed(150, 48, 3, bits), torch.randn(150, device=DEVICE)
    x_MK = random_rows(5, 48, torch.float32)
    actual = packed_linear_cpu(x_MK, *packed, bias_N, bits)
    torch.testing.assert_close(actual, packed_linear_reference(x_MK, *packed, bias_N, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_bias_is_that_of_the_dense_layer(dtype: torch.dtype) -> None:
    packed, x_MK = random_packed(20, 64, 2, 3), random_rows(6, 64, torch.float32)
    bias_N = torch.randn(20, device=DEVICE, dtype=dtype, requires_grad=True)
    y_MN = packed_linear(x_MK, *packed, bias_N, bits=3)
    (actual,) = torch.autograd.grad(y_MN.square().sum(), bias_N)
    weight_NK = dequantize_reference(*packed, 64, 3)
    dense_MN = F.linear(x_MK, weight_NK, bias_N.to(torch.float32))
    (expected,) = torch.autograd.grad(dense_MN.square().sum(), bias_N)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)


def test_gradient_is_that_of_the_dense_layer() -> None:
    packed = random_packed(12, 64, 2, 4)
    x = random_rows(6, 64, torch.float32).view(2, 3, 64).requires_grad_()
    weight_NK = dequantize_reference(*packed, 64, 4)
    y = packed_linear(x, *packed, bits=4)
    (actual,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(F.linear(x, weight_NK).square().sum(), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(64,), (2, 0, 64), (2, 3, 64)], ids=str)
def test_leading_axes(shape: tuple[int, ...]) -> None:
    packed = random_packed(12, 64, 2, 4)
    x = torch.ones(shape, dtype=torch.float16, device=DEVICE)
    y = packed_linear(x, *packed, bits=4)
    assert y.shape == (*shape[:-1], 12)
    assert y.dtype == torch.float16
    assert packed_linear_triton(x.reshape(-1, 64), *packed, None, 4).shape[1] == 12


def refused() -> dict[str, tuple[str, dict[str, object]]]:
    words_NW, _, zero_WG = random_packed(12, 64, 2, 4)
    assert zero_WG is not None
    return {
        "bits": ("bits must be 2 to 8, got 9", {"bits": 9}),
        "x's dtype": ("x must be", {"x": torch.ones(1, 64, dtype=torch.float64)}),
        "columns": ("weight must be int32", {"x": torch.ones(1, 72)}),
        "words": ("weight must be int32", {"weight_packed_NW": words_NW[:, :-1]}),
        "word dtype": ("weight must be int32", {"weight_packed_NW": words_NW.long()}),
        "groups": ("3 groups do not divide", {"weight_scale_NG": torch.ones(12, 3)}),
        "scales": ("scales must be a 2-D float", {"weight_scale_NG": torch.ones(12)}),
        "zero points": ("zero points must be", {"weight_zero_point_WG": zero_WG[:, :1]}),
        "bias": ("bias must be", {"bias_N": torch.ones(11)}),
    }


@pytest.mark.parametrize("case", list(refused()))
def test_refusals(case: str) -> None:
    words_NW, scale_NG, zero_WG = random_packed(12, 64, 2, 4)
    message, wrong = refused()[case]
    given = {
        "x": torch.ones(1, 64),
        "weight_packed_NW": words_NW,
        "weight_scale_NG": scale_NG,
        "weight_zero_point_WG": zero_WG,
        "bits": 4,
    }
    with pytest.raises(ValueError, match=message):
        packed_linear(**{**given, **wrong})
