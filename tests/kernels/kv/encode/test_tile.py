"""Pieces of the encoding kernel by themselves, in Triton's interpreter where there is no GPU."""

import pytest
import torch
import triton
import triton.language as tl

from rotq.ops import pack_kv
from rotq_kernels.kv.encode.tile import cos_sin, quantize, store_words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _cos_sin_kernel(cos_ptr, sin_ptr, position_ptr, freq_ptr, N: tl.constexpr, K: tl.constexpr):
    n, k = tl.arange(0, N), tl.arange(0, K)
    cos, sin = cos_sin(tl.load(position_ptr + n), tl.load(freq_ptr + k))
    tl.store(cos_ptr + n[:, None] * K + k[None, :], cos)
    tl.store(sin_ptr + n[:, None] * K + k[None, :], sin)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cos_and_sin_up_to_a_million(dtype: torch.dtype) -> None:
    position_N = torch.cat([torch.arange(32), torch.logspace(1.5, 6, 32).int()]).to(dtype)
    freq_K = torch.cat([10000.0 ** (-torch.arange(31) / 31), torch.zeros(1)])
    cos_NK, sin_NK = torch.empty(2, 64, 32, device=DEVICE)
    _cos_sin_kernel[(1,)](cos_NK, sin_NK, position_N.to(DEVICE), freq_K.to(DEVICE), N=64, K=32)
    angle_NK = position_N.double()[:, None] * freq_K.double()
    # 3e-6 is what half a unit of 2^-40 turns makes at position 10^6
    for found, exact in ((cos_NK.cpu(), angle_NK.cos()), (sin_NK.cpu(), angle_NK.sin())):
        error_NK = (found.double() - exact).abs()
        assert error_NK[:32].max() < 3e-7
        assert error_NK.max() < 3.5e-6
    assert cos_NK[:, -1].eq(1).all()


@triton.jit
def _words_kernel(
    words_ptr, code_ptr, N: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr
):
    n, d = tl.arange(0, N), tl.arange(0, BLOCK)
    at = code_ptr + n[:, None] * D + d[None, :]
    code = tl.load(at, mask=(d < D)[None, :], other=0).to(tl.int32)
    store_words(words_ptr, n.to(tl.int64), n < N - 1, code, D, BITS)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", [8, 32, 80, 96, 128])
def test_words_are_those_of_the_layout(bits: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (16, head_dim), generator=generator, dtype=torch.uint8)
    expected = pack_kv(codes, bits)
    words = torch.full_like(expected, -1, device=DEVICE)
    block = max(32, triton.next_power_of_2(head_dim))
    _words_kernel[(1,)](words, codes.to(DEVICE), N=16, BLOCK=block, D=head_dim, BITS=bits)
    assert torch.equal(words[:-1].cpu(), expected[:-1])
    assert words[-1].eq(-1).all()


@triton.jit
def _quantize_kernel(
    code_ptr, level_ptr, u_ptr, levels_ptr, thresholds_ptr, N: tl.constexpr, BITS: tl.constexpr
):
    n = tl.arange(0, N)
    code, level = quantize(tl.load(u_ptr + n)[None, :], levels_ptr, thresholds_ptr, BITS)
    tl.store(code_ptr + n[None, :], code)
    tl.store(level_ptr + n[None, :], level)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_threshold_belongs_to_the_code_below(bits: int) -> None:
    num_codes = 2**bits
    thresholds_L = (
        torch.linspace(-2.5, 2.25, num_codes - 1).square()
        * torch.linspace(-2.5, 2.25, num_codes - 1).sign()
    )
    thresholds_L = thresholds_L.sort().values
    levels_L = torch.arange(num_codes, dtype=torch.int8) * 3 - 20 if bits <= 4 else None
    ends = torch.tensor([-torch.inf, torch.inf, -0.0])
    u_N = torch.cat([thresholds_L, torch.nextafter(thresholds_L, ends[1]), ends])
    u_N = torch.nn.functional.pad(u_N, (0, 2 * num_codes - len(u_N)))
    code_N = torch.empty(2 * num_codes, dtype=torch.int32, device=DEVICE)
    level_N = torch.empty(2 * num_codes, device=DEVICE)
    table = torch.empty(0, dtype=torch.int8) if levels_L is None else levels_L
    given = (tensor.to(DEVICE) for tensor in (u_N, table, thresholds_L))
    _quantize_kernel[(1,)](code_N, level_N, *given, N=2 * num_codes, BITS=bits)
    code_N, level_N = code_N.cpu(), level_N.cpu()
    expected_N = (u_N[:, None] > thresholds_L).sum(1)
    assert torch.equal(code_N.long(), expected_N)
    assert code_N[: num_codes - 1].tolist() == list(range(num_codes - 1))
    if levels_L is None:
        assert torch.equal(level_N, expected_N - (num_codes - 1) / 2)
    else:
        assert torch.equal(level_N, levels_L.float()[expected_N])
