"""The packed layer against its dense weight, in values, gradients and memory layout."""

import pytest
import torch
from torch.nn import functional as F

from rotq_kernels.layout import pack
from rotq_kernels.trellis import linear
from rotq_kernels.trellis.code import path_levels
from rotq_kernels.trellis.linear import (
    dequantize_paths,
    packed_levels,
    trellis_linear,
    trellis_linear_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_weight(N: int, K: int, bits: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(N + bits)
    half = 2 ** (bits - 1)
    symbol_NK = torch.randint(-half, half, (N, K), generator=generator, dtype=torch.int8)
    scale_NG = torch.rand(N, groups, generator=generator).add_(0.5).half()
    return symbol_NK, scale_NG


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "K", "groups"), [(20, 24, 1), (576, 16, 2), (1024, 8, 1)])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [2, 6], ids=["few", "many"])
def test_equals_the_dense_layer(
    rows: int,
    bits: int,
    N: int,
    K: int,
    groups: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "CPU_TILE", 300 * K)  # a ring or two at a time
    symbol_NK, scale_NG = random_weight(N, K, bits, groups)
    level_NGg = path_levels(symbol_NK, bits, 12).unflatten(1, (groups, -1))
    weight_NK = (level_NGg * scale_NG.float()[..., None]).flatten(1).to(dtype)
    words_WK = pack(symbol_NK, bits, dim=0)
    assert torch.equal(dequantize_paths(words_WK, scale_NG, bits, 12, dtype), weight_NK)
    x = torch.randn(1, rows, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias_N = torch.ones(N, dtype=dtype)
    found = trellis_linear(x, words_WK, scale_NG, bias_N, bits=bits, state_bits=12)
    assert found.dtype == dtype
    exact = F.linear(x.double(), (level_NGg * scale_NG[..., None]).flatten(1).double()) + 1.0
    plain = F.linear(x, weight_NK, bias_N)
    limit = 2 * (plain - exact).abs().max() + 1e-6
    assert (found - exact).abs().max() <= limit


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("N", [20, 96, 512, 577])
def test_native_levels_are_those_of_plain_pytorch(
    bits: int, N: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    symbol_NK, _ = random_weight(N, 20, bits, 1)
    found_NK = packed_levels(pack(symbol_NK, bits, dim=0), N, bits, 13)
    monkeypatch.setattr(linear, "is_native", lambda: False)
    assert torch.equal(packed_levels(pack(symbol_NK, bits, dim=0), N, bits, 13), found_NK)


def test_gradients_and_the_operator() -> None:
    symbol_NK, scale_NG = random_weight(32, 24, 3, 1)
    words_WK = pack(symbol_NK, 3, dim=0)
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bias_N = torch.zeros(32, requires_grad=True)
    trellis_linear(x, words_WK, scale_NG, bias_N, bits=3, state_bits=12).square().sum().backward()
    dense, bias = x.detach().requires_grad_(), torch.zeros(32, requires_grad=True)
    weight_NK = dequantize_paths(words_WK, scale_NG, 3, 12)
    F.linear(dense, weight_NK, bias).square().sum().backward()
    torch.testing.assert_close(x.grad, dense.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(bias_N.grad, bias.grad, rtol=1e-4, atol=1e-3)
    torch.library.opcheck(
        torch.ops.rotq.trellis_linear.default, (x.detach(), words_WK, scale_NG, None, 3, 12)
    )


def test_refuses_other_inputs() -> None:
    symbol_NK, scale_NG = random_weight(32, 24, 3, 1)
    with pytest.raises(ValueError, match=r"x must be \(..., 24\)"):
        trellis_linear(
            torch.zeros(2, 23), pack(symbol_NK, 3, dim=0), scale_NG, bits=3, state_bits=12
        )


@pytest.mark.parametrize(
    ("M", "dtype", "bias"),
    [
        (1, torch.float32, False),
        (1, torch.bfloat16, True),
        (2, torch.float32, True),
        (2, torch.bfloat16, False),
        (5, torch.float32, False),
        (5, torch.bfloat16, True),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("bits", "N", "K", "groups", "state_bits"),
    [(3, 96, 40, 1, 12), (2, 577, 20, 1, 12), (1, 20, 140, 2, 16), (5, 512, 24, 3, 8)],
    ids=str,
)
def test_kernels_are_no_worse_than_the_dense_layer(
    bits: int,
    N: int,
    K: int,
    groups: int,
    state_bits: int,
    M: int,
    dtype: torch.dtype,
    bias: bool,
) -> None:
    """Against fp64, on rings that end within a word too."""
    symbol_NK, scale_NG = random_weight(N, K, bits, groups)
    words_WK = pack(symbol_NK, bits, dim=0)
    x_MK = torch.randn(M, 2 * K, generator=torch.Generator().manual_seed(M)).to(dtype)[:, :K]
    bias_N = torch.linspace(-1, 1, N).to(dtype) if bias else None
    moved = [None if t is None else t.to(DEVICE) for t in (x_MK, words_WK, scale_NG, bias_N)]
    found_MN = trellis_linear_triton(*moved, bits, state_bits).cpu()  # type: ignore[arg-type]
    exact_NK = dequantize_paths(words_WK, scale_NG, bits, state_bits, torch.float64)
    exact_MN = F.linear(x_MK.double(), exact_NK, None if bias_N is None else bias_N.double())
    plain_MN = F.linear(x_MK, exact_NK.to(dtype), bias_N)
    floor = 3e-7 * exact_MN.abs().max()  # a few units in the last place of fp32
    limit = 2 * (plain_MN - exact_MN).abs().max() + floor
    assert (found_MN - exact_MN).abs().max() <= limit
