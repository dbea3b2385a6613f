"""The Hadamard kernels against an fp64 oracle, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rotq.rotations.hadamard import core_order, paley_core
from rotq.rotations.hadamard import hadamard as dense_hadamard
from rotq_kernels import hadamard as kernels
from rotq_kernels.hadamard import hadamard, hadamard_reference, hadamard_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [1, 2, 64, 1024, 12, 28, 96, 576, 688]
"""With and without a core; cores below, at and above a block, alone and with runs."""


def rows(R: int, K: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    generator = torch.Generator().manual_seed(R * K)
    if layout == "transposed":
        return torch.randn(K, R, generator=generator).to(dtype).T.to(DEVICE)
    if layout == "rows of a wider buffer":
        return torch.randn(R, K + 5, generator=generator).to(dtype).to(DEVICE)[:, 3 : K + 3]
    return torch.randn(R, K, generator=generator).to(dtype).to(DEVICE)


def core_of(K: int) -> Tensor:
    return paley_core(core_order(K)).to(DEVICE)


def signs_of(K: int) -> Tensor:
    generator = torch.Generator().manual_seed(K)
    signs_K = torch.randint(0, 2, (K,), generator=generator, dtype=torch.int8) * 2 - 1
    return signs_K.to(DEVICE)


def oracle(x_RK: Tensor, signs_K: Tensor | None) -> Tensor:
    K = x_RK.shape[1]
    signed = x_RK.double() if signs_K is None else x_RK.double() * signs_K
    return signed @ dense_hadamard(K).to(signed) / math.sqrt(K)


def assert_no_worse(actual: Tensor, x_RK: Tensor, signs_K: Tensor | None) -> None:
    """Error at most twice that of a plain product in the same dtype, as fp32 sums give it."""
    K = x_RK.shape[1]
    exact = oracle(x_RK, signs_K)
    signed = x_RK.float() if signs_K is None else x_RK.float() * signs_K
    plain = (signed @ dense_hadamard(K).to(signed) / math.sqrt(K)).to(x_RK.dtype)
    ours, theirs = ((y.double() - exact).abs().max().item() for y in (actual, plain))
    assert ours <= 2 * theirs + 1e-6, f"max error {ours:.3e}; the plain product's is {theirs:.3e}"


@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", SIZES)
def test_kernels(K: int, dtype: torch.dtype, signed: bool) -> None:
    x_RK = rows(3, K, dtype)
    signs_K = signs_of(K) if signed else None
    y_RK = hadamard_triton(x_RK, core_of(K), signs_K)
    assert y_RK.dtype == dtype
    assert_no_worse(y_RK, x_RK, signs_K)


@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signs"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("K", SIZES)
def test_reference(K: int, dtype: torch.dtype, signed: bool) -> None:
    x_RK = rows(2, K, dtype)
    signs_K = signs_of(K) if signed else None
    y_RK = hadamard_reference(x_RK, core_of(K), signs_K)
    assert y_RK.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(y_RK, oracle(x_RK, signs_K), rtol=0, atol=1e-12)
    else:
        assert_no_worse(y_RK, x_RK, signs_K)


@pytest.mark.parametrize("layout", ["rows of a wider buffer", "transposed"])
@pytest.mark.parametrize("K", [64, 96])
def test_layouts(K: int, layout: str) -> None:
    x_RK = rows(5, K, torch.float32, layout)
    before = x_RK.clone()
    for transform in (hadamard_triton, hadamard):
        y_RK = transform(x_RK, core_of(K), signs_of(K))
        assert y_RK.is_contiguous()
        assert_no_worse(y_RK, x_RK, signs_of(K))
    assert torch.equal(x_RK, before)


@pytest.mark.parametrize("K", [64, 48])
@pytest.mark.parametrize("R", [1, 31, 67])
def test_any_number_of_rows(R: int, K: int) -> None:
    """Below a program's rows, just under, and over several programs."""
    x_RK = rows(R, K, torch.float32)
    assert_no_worse(hadamard_triton(x_RK, core_of(K)), x_RK, None)


def test_several_programs_along_runs_and_core() -> None:
    x_RK = rows(40, 688, torch.bfloat16)
    assert_no_worse(hadamard_triton(x_RK, core_of(688), signs_of(688)), x_RK, signs_of(688))


def test_products_are_fp32_whatever_torch_is_set_to() -> None:
    x_RK = rows(8, 576, torch.float32)
    expected = hadamard(x_RK, core_of(576))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(hadamard(x_RK, core_of(576)), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_rows() -> None:
    for transform in (hadamard_triton, hadamard_reference):
        assert transform(rows(0, 48, torch.float32), core_of(48)).shape == (0, 48)


@pytest.mark.parametrize("layout", ["contiguous", "rows of a wider buffer", "transposed"])
@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signs"])
@pytest.mark.parametrize("K", [1, 64, 48])
def test_operator_is_registered_as_it_behaves(K: int, signed: bool, layout: str) -> None:
    arguments = (rows(3, K, torch.bfloat16, layout), core_of(K), signs_of(K) if signed else None)
    torch.library.opcheck(torch.ops.rotq.hadamard.default, arguments)


@pytest.mark.parametrize(
    ("x", "core", "signs", "message"),
    [
        (torch.zeros(2, 3, 4), torch.ones(1, 1, dtype=torch.int8), None, r"takes \(R, K\) floats"),
        (torch.zeros(2, 4).long(), torch.ones(1, 1, dtype=torch.int8), None, "takes"),
        (torch.zeros(2, 6), torch.ones(1, 1, dtype=torch.int8), None, "do not make 6"),
        (torch.zeros(2, 4), torch.ones(1, 2, dtype=torch.int8), None, "do not make 4"),
        (torch.zeros(2, 4), torch.ones(8, 8, dtype=torch.int8), None, "do not make 4"),
        (torch.zeros(2, 4), torch.ones(1, 1), None, "must be int8"),
        (torch.zeros(2, 4), torch.ones(1, 1, dtype=torch.int8), torch.ones(4), "must be int8"),
        (
            torch.zeros(2, 4),
            torch.ones(1, 1, dtype=torch.int8),
            torch.ones(3, dtype=torch.int8),
            "signs have shape",
        ),
    ],
)
def test_refusals(x: Tensor, core: Tensor, signs: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hadamard(x, core, signs)


@pytest.mark.parametrize("K", [32, 64, 256, 384])
def test_runs_that_no_program_holds(K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of them becomes a part of the core."""
    monkeypatch.setattr(kernels, "LONGEST_RUN", 32)
    x_RK = rows(3, K, torch.bfloat16)
    assert_no_worse(hadamard_triton(x_RK, core_of(K), signs_of(K)), x_RK, signs_of(K))


def test_fast_hadamard_copies_its_core_to_a_device_once() -> None:
    """A copy from the host would wait for the device, and cannot be captured in a CUDA graph."""
    from rotq.rotations.hadamard import fast_hadamard

    signs_K, copies = torch.ones(14336, dtype=torch.int8, device="meta"), []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
            tensors = [item for item in args if isinstance(item, Tensor)]
            if any(item.device.type == "cpu" for item in tensors):
                copies.append(str(func))
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        copies.clear()
        with Log():
            fast_hadamard(torch.ones(1, 14336, device="meta"), None, signs_K)
    assert not copies


def test_fast_hadamard_takes_the_operator_without_gradient_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rotq.rotations.hadamard import fast_hadamard

    taken: list[str] = []

    def operator(x_RK: Tensor, *_: Tensor | None) -> Tensor:
        taken.append("operator")
        return x_RK.clone()

    def reference(x_RK: Tensor, *_: Tensor | None) -> Tensor:
        taken.append("reference")
        return x_RK.clone()

    monkeypatch.setattr("rotq.ops.hadamard", operator)
    monkeypatch.setattr("rotq.ops.hadamard_reference", reference)
    fast_hadamard(torch.zeros(2, 48))
    fast_hadamard(torch.zeros(2, 48).requires_grad_())
    fast_hadamard(torch.zeros(2, 48).double())
    with torch.no_grad():
        fast_hadamard(torch.zeros(2, 48).requires_grad_())
    assert taken == ["operator", "reference", "reference", "operator"]
