"""The butterfly kernel against an fp64 oracle, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rotq.rotations.hadamard import core_order, paley_core
from rotq_kernels import butterfly as kernels
from rotq_kernels.butterfly import butterfly, butterfly_reference, butterfly_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [2, 64, 1024, 24, 96, 576, 688]
"""With and without a core; one stage, and runs of one program and of several."""


def rows(R: int, K: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    generator = torch.Generator().manual_seed(R * K)
    if layout == "transposed":
        return torch.randn(K, R, generator=generator).to(dtype).T.to(DEVICE)
    if layout == "rows of a wider buffer":
        return torch.randn(R, K + 5, generator=generator).to(dtype).to(DEVICE)[:, 3 : K + 3]
    return torch.randn(R, K, generator=generator).to(dtype).to(DEVICE)


def parts(K: int, *, signed: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Core, angles and signs."""
    generator = torch.Generator().manual_seed(K)
    core_MM = paley_core(core_order(K)).to(DEVICE)
    M = len(core_MM)
    shape = ((K // M).bit_length() - 1, M, K // M // 2)
    angles_AMQ = (2 * math.pi * torch.rand(shape, generator=generator)).to(DEVICE)
    signs_K = torch.randint(0, 2, (K,), generator=generator, dtype=torch.int8) * 2 - 1
    return core_MM, angles_AMQ, signs_K.to(DEVICE) if signed else None


def oracle(x_RK: Tensor, core_MM: Tensor, angles_AMQ: Tensor, signs_K: Tensor | None) -> Tensor:
    """In fp64, pair by pair in natural order."""
    M, K = len(core_MM), x_RK.shape[1]
    y = x_RK.double() if signs_K is None else x_RK.double() * signs_K
    stages = len(angles_AMQ)
    y = y.reshape(len(x_RK), M, K // M)
    for stage, angle_MQ in enumerate(angles_AMQ.double()):
        # natural order: bits above the stage, the pair's bit, bits below it
        y = y.unflatten(-1, (2 ** (stages - 1 - stage), 2, 2**stage))
        # stored order: bits below the stage, which have moved to the top, then those above
        t = angle_MQ.view(M, 2**stage, -1).transpose(1, 2)
        a, b = y.unbind(-2)
        y = torch.stack((t.cos() * a + t.sin() * b, t.sin() * a - t.cos() * b), dim=-2).flatten(2)
    return (core_MM.double().T / math.sqrt(M) @ y).reshape(len(x_RK), K)


def assert_no_worse(actual: Tensor, x_RK: Tensor, given: tuple[Tensor, Tensor, Tensor | None]):
    """Error at most twice that of a product with the dense matrix in fp32."""
    exact = oracle(x_RK, *given)
    eye = torch.eye(x_RK.shape[1], device=x_RK.device)
    plain = (x_RK.float() @ oracle(eye, *given).float()).to(x_RK.dtype)
    ours, theirs = ((y.double() - exact).abs().max().item() for y in (actual, plain))
    assert ours <= 2 * theirs + 1e-6, f"max error {ours:.3e}; the plain product's is {theirs:.3e}"


@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", SIZES)
def test_kernel(K: int, dtype: torch.dtype, signed: bool) -> None:
    x_RK, given = rows(3, K, dtype), parts(K, signed=signed)
    y_RK = butterfly_triton(x_RK, *given)
    assert y_RK.dtype == dtype
    assert_no_worse(y_RK, x_RK, given)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("K", SIZES)
def test_reference(K: int, dtype: torch.dtype) -> None:
    x_RK, given = rows(2, K, dtype), parts(K)
    y_RK = butterfly_reference(x_RK, *given)
    assert y_RK.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(y_RK, oracle(x_RK, *given), rtol=0, atol=1e-12)
    else:
        assert_no_worse(y_RK, x_RK, given)


@pytest.mark.parametrize("layout", ["rows of a wider buffer", "transposed"])
@pytest.mark.parametrize("K", [64, 96])
def test_layouts(K: int, layout: str) -> None:
    x_RK, given = rows(5, K, torch.float32, layout), parts(K)
    before = x_RK.clone()
    for transform in (butterfly_triton, butterfly):
        y_RK = transform(x_RK, *given)
        assert y_RK.is_contiguous()
        assert_no_worse(y_RK, x_RK, given)
    assert torch.equal(x_RK, before)


@pytest.mark.parametrize("K", [64, 48])
@pytest.mark.parametrize("R", [1, 31, 67])
def test_any_number_of_rows(R: int, K: int) -> None:
    """Below a program's rows, just under, and over several programs."""
    x_RK, given = rows(R, K, torch.float32), parts(K)
    assert_no_worse(butterfly_triton(x_RK, *given), x_RK, given)


def test_products_are_fp32_whatever_torch_is_set_to() -> None:
    x_RK, given = rows(8, 576, torch.float32), parts(576)
    expected = butterfly(x_RK, *given)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(butterfly(x_RK, *given), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_rows() -> None:
    for transform in (butterfly_triton, butterfly_reference):
        assert transform(rows(0, 48, torch.float32), *parts(48)).shape == (0, 48)


@pytest.mark.parametrize("layout", ["contiguous", "rows of a wider buffer", "transposed"])
@pytest.mark.parametrize("K", [64, 48])
def test_operator_is_registered_as_it_behaves(K: int, layout: str) -> None:
    arguments = (rows(3, K, torch.bfloat16, layout), *parts(K))
    torch.library.opcheck(torch.ops.rotq.butterfly.default, arguments)


@pytest.mark.parametrize(
    ("x", "core", "angles", "signs", "message"),
    [
        (torch.zeros(2, 4).long(), 1, (2, 1, 2), None, r"takes \(R, K\) floats"),
        (torch.zeros(2, 6), 1, (2, 1, 3), None, "do not make 6"),
        (torch.zeros(2, 1), 1, (0, 1, 0), None, "do not make 1"),
        (torch.zeros(2, 4), 1, (1, 1, 2), None, r"angles are \(1, 1, 2\) .* expected \(2, 1, 2\)"),
        (torch.zeros(2, 4), 1, (2, 1, 2), torch.ones(4), "must be int8"),
        (torch.zeros(2, 4), 1, (2, 1, 2), torch.ones(3, dtype=torch.int8), "signs have shape"),
    ],
)
def test_refusals(
    x: Tensor, core: int, angles: tuple[int, ...], signs: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        butterfly(x, torch.ones(core, core, dtype=torch.int8), torch.zeros(angles), signs)


def test_angles_in_another_dtype_are_refused() -> None:
    core_MM, angles_AMQ, _ = parts(64)
    with pytest.raises(ValueError, match="float64, expected"):
        butterfly(rows(1, 64, torch.float32), core_MM, angles_AMQ.double())


def test_runs_that_no_program_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LONGEST_RUN", 32)
    with pytest.raises(ValueError, match="runs of 64 elements; the kernel holds 32"):
        butterfly_triton(rows(1, 64, torch.float32), *parts(64))
