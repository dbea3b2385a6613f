"""Products in integers against the definition in fp64, and where they are not taken."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from rotq.formats.activations import ActivationGrid, fake_quantize, token_codes
from rotq.formats.integer import Grid, Quantized
from rotq.layers.integer_product import (
    can_multiply_integers,
    integer_linear,
    multiplies_exactly,
)
from rotq.layers.quant_linear import QuantLinear, multiply_integers

K, N = 96, 40
BYTES = ActivationGrid(bits=8, symmetric=False)
VNNI = pytest.mark.skipif(not multiplies_exactly(), reason="no VNNI, or oneDNN does without it")
WRONG = torch.cpu._is_vnni_supported() and not multiplies_exactly()
"""What torch makes of int8 where oneDNN was told to do without VNNI."""


def weight(grid: Grid) -> Quantized:
    """Codes over the whole range of a grid."""
    generator = torch.Generator().manual_seed(0)
    groups = K // grid.columns_per_group(K)
    draw = {"low": grid.q_min, "high": grid.q_max + 1, "generator": generator}
    zero_NG = None
    if not grid.symmetric:
        zero_NG = torch.randint(**draw, size=(N, groups), dtype=torch.int8)
    return Quantized(
        q_NK=torch.randint(**draw, size=(N, K), dtype=torch.int8),
        scale_NG=(torch.rand(N, groups, generator=generator) + 0.5).half(),
        zero_NG=zero_NG,
        grid=grid,
    )


def tokens(dtype: torch.dtype) -> Tensor:
    """Of all kinds: large, one-sided, all the same, zero."""
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1))
    x[0, 1] *= 1e3
    x[0, 2] = x[0, 2].abs() + 1
    x[0, 3] = 0.25
    x[1, 4] = 0
    return x.to(dtype)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_codes_are_those_of_the_rounded_values(symmetric: bool) -> None:
    grid, x = ActivationGrid(bits=8, symmetric=symmetric), tokens(torch.float32)
    q, scale, zero = token_codes(x, grid)
    assert q.dtype == torch.int8
    back = (q.float() - (0 if zero is None else zero)) * scale
    assert torch.equal(back, fake_quantize(x, grid))


@pytest.mark.parametrize("inputs", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "grid",
    [
        Grid(bits=8, symmetric=True, group_size=-1),
        Grid(bits=4, symmetric=True, group_size=32),
        Grid(bits=4, symmetric=False, group_size=16),
        Grid(bits=7, symmetric=False, group_size=-1),
        Grid(bits=3, symmetric=False, group_size=48),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(WRONG, reason="products of int8 are wrong here, and not taken")
def test_no_worse_than_the_dense_product(grid: Grid, inputs: bool, dtype: torch.dtype) -> None:
    held, x = weight(grid), tokens(dtype)
    input_grid = ActivationGrid(bits=8, symmetric=inputs)
    bias_N = torch.randn(N, generator=torch.Generator().manual_seed(2)).to(dtype)
    ours = integer_linear(x, held, bias_N, input_grid)
    assert (ours.dtype, ours.shape) == (dtype, (2, 5, N))
    rounded = fake_quantize(x.float(), input_grid)
    oracle = rounded.double() @ held.dequantize(torch.float64).T + bias_N.double()
    plain = nn.functional.linear(fake_quantize(x, input_grid), held.dequantize(dtype), bias_N)
    errors = [(y.double() - oracle).abs().max().item() for y in (ours, plain)]
    assert errors[0] <= 2 * errors[1] + 1e-4


@VNNI
def test_layers_take_it_where_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantLinear.from_quantized(
        weight(Grid(bits=8, symmetric=True, group_size=-1)), input_grid=BYTES
    )
    x = tokens(torch.float32)
    assert torch.equal(layer(x), layer.dense(torch.float32)(x))
    multiply_integers(layer)
    monkeypatch.setattr(layer, "product", None)
    whole = layer(x)
    monkeypatch.undo()
    torch.testing.assert_close(whole, layer.dense(torch.float32)(x), rtol=1e-5, atol=1e-2)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("grid", "input_grid", "is_missed"),
    [
        (Grid(bits=8, symmetric=True, group_size=-1), BYTES, True),
        (Grid(bits=8, symmetric=False, group_size=-1), BYTES, False),
        (Grid(bits=8, symmetric=True, group_size=-1), None, False),
    ],
)
def test_a_model_that_misses_them_is_known(
    grid: Grid, input_grid: ActivationGrid | None, is_missed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = QuantLinear.from_quantized(weight(grid), input_grid=input_grid)
    model = torch.nn.Sequential(torch.nn.ReLU(), layer)
    monkeypatch.setattr("rotq.layers.quant_linear.multiplies_exactly", lambda: False)
    assert multiply_integers(model) is is_missed
    assert not multiply_integers(model.to("meta"))
    monkeypatch.setattr("rotq.layers.quant_linear.multiplies_exactly", lambda: True)
    assert not multiply_integers(model)


@VNNI
def test_where_it_is_not_taken() -> None:
    x, symmetric = tokens(torch.float32), Grid(bits=8, symmetric=True, group_size=-1)
    assert can_multiply_integers(x, symmetric, BYTES)
    assert not can_multiply_integers(x.double(), symmetric, BYTES)
    assert not can_multiply_integers(x, symmetric, None)
    assert not can_multiply_integers(x, symmetric, ActivationGrid(bits=4, symmetric=True))
    # a code less its zero point takes 9 bits
    assert not can_multiply_integers(x, Grid(bits=8, symmetric=False, group_size=-1), BYTES)
    assert not can_multiply_integers(x.requires_grad_(), symmetric, BYTES)


LIMITED = """
import torch
from rotq.layers.integer_product import multiplies_exactly
a_MK, b_KN = (torch.randint(-127, 128, (64, 64), dtype=torch.int8) for _ in range(2))
found = torch._int_mm(a_MK, b_KN).double()
print(not multiplies_exactly() or torch.equal(found, a_MK.double() @ b_KN.double()))
"""


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_products_that_a_limited_library_gets_wrong_are_not_taken(limit: str) -> None:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
    command = [sys.executable, "-c", LIMITED]
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "True"
