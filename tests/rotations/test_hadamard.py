"""Orders, entries and the fast transform of constructed Hadamard matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotq.rotations.hadamard import (
    MAX_CORE,
    _paley_field,
    core_order,
    describe,
    fast_hadamard,
    hadamard,
    inverse_hadamard,
    orthogonal,
    random_signs,
)

# hidden, intermediate and head sizes of released models: order, its smallest core
MODEL_SIZES = {
    11008: 344,
    13824: 108,
    14336: 28,
    5632: 44,
    576: 36,
    1536: 12,
    960: 60,
    896: 28,
    4864: 76,
    8960: 140,
    3584: 28,
    18944: 148,
    2560: 20,
    9728: 76,
    12288: 12,
    17408: 68,
    25600: 100,
    29568: 924,
    6912: 108,
    1152: 36,
    3840: 60,
    15360: 60,
    5376: 84,
    21504: 84,
    2880: 180,
    10944: 684,
    1408: 44,
    768: 12,
    3072: 12,
    96: 12,
    480: 60,
    1920: 60,
    24: 12,
    **{20 * 2**a: 20 for a in range(11)},
    **{2**a: 1 for a in range(13)},
}


@pytest.mark.parametrize("n", sorted(MODEL_SIZES))
def test_model_sizes_have_the_smallest_core(n):
    m = core_order(n)
    assert m == MODEL_SIZES[n]
    C = hadamard(m).double()
    assert torch.equal(C @ C.T, m * torch.eye(m, dtype=torch.float64))
    assert torch.equal(C.abs(), torch.ones_like(C))


@pytest.mark.parametrize("n", [m for m in range(4, MAX_CORE + 1, 4) if _paley_field(m)])
def test_every_paley_core_is_a_hadamard_matrix(n):
    H = hadamard(n).float()
    assert torch.equal(H @ H.T, n * torch.eye(n))
    assert set(H.unique().tolist()) == {-1.0, 1.0}


def test_smallest_orders_by_hand():
    assert hadamard(1).tolist() == [[1]]
    assert hadamard(2).tolist() == [[1, 1], [1, -1]]
    assert hadamard(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    # Paley I over GF(11), whose squares are 1, 3, 4, 5, 9; row a_0 = 0 shows chi(-j)
    assert hadamard(12)[1].tolist() == [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]


def test_unreachable_orders_up_to_256_are_the_known_ones():
    unreachable = []
    for n in range(4, 257, 4):
        try:
            core_order(n)
        except ValueError:
            unreachable.append(n)
    assert unreachable == [92, 116, 156, 172, 184, 188, 232, 236]


@pytest.mark.parametrize(
    ("n", "reason"),
    [
        (9, "orders are 1, 2 and multiples of 4"),
        (18, "orders are 1, 2 and multiples of 4"),
        (92, "not m . 2.a with a core m up to 1024"),
    ],
)
def test_missing_orders_name_the_fallbacks(n, reason):
    with pytest.raises(ValueError, match=rf"order {n}: .*{reason}.*dct.*block_hadamard"):
        hadamard(n)


def test_order_must_be_positive():
    with pytest.raises(ValueError, match="positive order, got 0"):
        core_order(0)


@pytest.mark.parametrize("n", [1, 2, 8, 12, 20, 24, 28, 36, 80, 576])
@pytest.mark.parametrize("runs", [1, 3])
def test_fast_transform_is_the_dense_product(n, runs):
    x = torch.randn(2, 5, runs * n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    dense = x.view(2, 5, runs, n) @ (hadamard(n).double() / math.sqrt(n))
    torch.testing.assert_close(fast_hadamard(x, n), dense.reshape(x.shape), rtol=0, atol=1e-12)


def test_fast_transform_defaults_to_the_whole_row_and_takes_any_layout():
    x = torch.randn(7, 48, dtype=torch.float64)
    expected = x @ (hadamard(48).double() / math.sqrt(48))
    torch.testing.assert_close(fast_hadamard(x), expected, rtol=0, atol=1e-12)
    transposed = x.T.contiguous().T
    torch.testing.assert_close(fast_hadamard(transposed), expected, rtol=0, atol=1e-12)
    assert fast_hadamard(x[:0]).shape == (0, 48)


@settings(max_examples=30, deadline=None)
@given(
    n=st.sampled_from([2, 12, 20, 28, 40, 96, 144]),
    rows=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_fast_transform_keeps_lengths_and_dot_products(n, rows, seed):
    x = torch.randn(rows, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = fast_hadamard(x, n)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype):
    x = torch.randn(64, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = fast_hadamard(x, 768)
    assert y.dtype == dtype
    assert torch.equal(y, fast_hadamard(x.float(), 768).to(dtype))


def test_fast_transform_is_differentiable():
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: fast_hadamard(t, 12), x)


def test_fast_transform_refuses_other_widths():
    with pytest.raises(ValueError, match="30 features are not a multiple of the order 12"):
        fast_hadamard(torch.ones(1, 30), 12)


@pytest.mark.parametrize(
    ("kind", "n"),
    [("hadamard", 36), ("block_hadamard", 18), ("dct", 9), ("dct", 1)],
)
def test_bases_are_orthogonal_and_seeded(kind, n):
    R = orthogonal(kind, n, seed=1)
    assert R.dtype == torch.float64
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(R @ R.T, eye, rtol=0, atol=1e-13)
    assert torch.equal(R, orthogonal(kind, n, seed=1))
    if n > 1:
        assert not torch.equal(R, orthogonal(kind, n, seed=2))


def test_hadamard_basis_is_what_the_fast_transform_applies():
    x = torch.randn(4, 80, dtype=torch.float64)
    fast = fast_hadamard(x * random_signs(80, 5))
    torch.testing.assert_close(x @ orthogonal("hadamard", 80, 5), fast, rtol=0, atol=1e-12)


def test_block_hadamard_takes_the_largest_power_of_two():
    R = orthogonal("block_hadamard", 24, seed=0)
    inside = torch.block_diag(*[torch.ones(8, 8)] * 3).bool()
    assert (R[inside].abs() - 8**-0.5).abs().max() < 1e-15
    assert (R[~inside] == 0).all()
    with pytest.raises(ValueError, match="needs an even order, got 9; dct"):
        orthogonal("block_hadamard", 9, seed=0)


def test_block_hadamard_of_a_size():
    R = orthogonal("block_hadamard", 24, seed=0, block_size=4)
    inside = torch.block_diag(*[torch.ones(4, 4)] * 6).bool()
    assert (R[inside].abs() - 0.5).abs().max() < 1e-15
    assert (R[~inside] == 0).all()
    assert describe("block_hadamard", 24, 4) == "block_hadamard 6 blocks of 4"
    with pytest.raises(ValueError, match="blocks of 16 do not divide 24"):
        orthogonal("block_hadamard", 24, seed=0, block_size=16)


def test_unknown_basis_lists_the_known():
    with pytest.raises(ValueError, match="unknown basis 'givens'; known: hadamard"):
        orthogonal("givens", 8, seed=0)


def test_signs_are_int8_and_balanced():
    signs = random_signs(4096, seed=0)
    assert signs.dtype == torch.int8
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(signs.float().mean()) < 0.1


@pytest.mark.parametrize(
    ("kind", "n", "name"),
    [
        ("hadamard", 576, "hadamard 36x16"),
        ("hadamard", 64, "hadamard 64"),
        ("hadamard", 12, "hadamard 12"),
        ("block_hadamard", 24, "block_hadamard 3 blocks of 8"),
        ("dct", 9, "dct 9"),
    ],
)
def test_descriptions(kind, n, name):
    assert describe(kind, n) == name


@pytest.mark.parametrize("n", [16, 12, 48, 576])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_inverse_takes_the_transform_back(n: int, dtype: torch.dtype) -> None:
    """Cores are not symmetric, nor is D H."""
    signs_n = random_signs(n, 3)
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    again = inverse_hadamard(fast_hadamard(x, n, signs_n), signs_n)
    assert again.dtype == dtype
    assert (again - x).abs().max() < 8 * n**0.5 * torch.finfo(dtype).eps
