"""Packed layers against dense ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny_checkpoints import W3_CHANNEL, W4, W4_SYMMETRIC, random_quantized
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rotq.formats.activations import ActivationGrid, fake_quantize
from rotq.formats.integer import Grid, PlainGrid
from rotq.formats.trellis import Trellis
from rotq.layers.online_linear import OnlineLinear, rotate_input
from rotq.layers.packed_weight import ROWS_AT_ONCE
from rotq.layers.quant_linear import QuantLinear
from rotq.ops import packed_linear
from rotq.rotations.hadamard import random_signs

PLAIN = PlainGrid(bits=8, group_size=8, symmetric=True)
GRIDS = [
    W4,
    W4_SYMMETRIC,
    W3_CHANNEL,
    *(Grid(bits=bits, group_size=8, symmetric=bits % 2 == 0) for bits in (2, 5, 6, 7, 8)),
    PLAIN,
]

PATHS = Trellis(bits=3, group_size=8, state_bits=12)


def random_input(K: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, K, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equals_the_dense_layer(grid: Grid, dtype: torch.dtype) -> None:
    quantized = random_quantized(20, 40, grid)
    bias_N = torch.randn(20, generator=torch.Generator().manual_seed(2)).to(dtype)
    layer = QuantLinear.from_quantized(quantized, bias_N)
    x = random_input(40, dtype)
    expected = F.linear(x, quantized.dequantize(dtype), bias_N)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.dense(dtype)(x), expected)


@pytest.mark.parametrize("grid", [*GRIDS, PATHS], ids=str)
def test_unpacks_to_what_was_packed(grid: Grid) -> None:
    quantized = random_quantized(20, 40, grid)
    again = QuantLinear.from_quantized(quantized).quantized()
    assert torch.equal(again.q_NK, quantized.q_NK)
    assert torch.equal(again.scale_NG, quantized.scale_NG)
    assert again.grid == grid
    if quantized.zero_NG is None:
        assert again.zero_NG is None
    else:
        assert again.zero_NG is not None
        assert torch.equal(again.zero_NG, quantized.zero_NG)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("grid", [*GRIDS, PATHS], ids=str)
def test_allocated_and_packed_layers_have_one_state(grid: Grid, rotated: bool, bias: bool) -> None:
    packed = QuantLinear.from_quantized(
        random_quantized(20, 40, grid),
        torch.ones(20) if bias else None,
        random_signs(40, 0) if rotated else None,
    )
    empty = QuantLinear(40, 20, grid, bias=bias, rotation_size=40 if rotated else None)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in packed.state_dict().items()
    }
    empty.load_state_dict(packed.state_dict())
    x = random_input(40)
    assert torch.equal(empty(x), packed(x))


@pytest.mark.parametrize("rotated", [False, True])
def test_inputs_are_rounded_behind_their_rotation(rotated: bool) -> None:
    grid = ActivationGrid(bits=3, symmetric=False)
    signs_R = random_signs(40, 0) if rotated else None
    quantized = random_quantized(20, 40, W4)
    layer = QuantLinear.from_quantized(quantized, signs_R=signs_R, input_grid=grid)
    x = random_input(40)
    turned = rotate_input(x, signs_R) if signs_R is not None else x
    expected = F.linear(fake_quantize(turned, grid), quantized.dequantize())
    assert torch.equal(layer(x), expected)
    dense = layer.dense(torch.float32)
    assert isinstance(dense, OnlineLinear)
    assert torch.equal(dense(x), expected)
    # wrapping it again keeps the rotation
    other = OnlineLinear.wrap(dense, input_grid=ActivationGrid(bits=8, symmetric=True))
    assert torch.equal(other.prepare_input(x), fake_quantize(turned, other.input_grid))


def test_nothing_dense_is_kept() -> None:
    layer = QuantLinear.from_quantized(random_quantized(64, 256, W4_SYMMETRIC))
    layer(random_input(256))
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert stored == 64 * 256 // 2 + 64 * 32 * 2 + 16
    assert not list(layer.parameters())
    assert all(name in layer._buffers for name in layer.state_dict())


def test_packed_rotated_layer() -> None:
    quantized, signs_R = random_quantized(20, 48, W4), random_signs(48, 3)
    layer = QuantLinear.from_quantized(quantized, None, signs_R)
    x = random_input(48)
    expected = F.linear(rotate_input(x, signs_R), quantized.dequantize())
    assert torch.equal(layer(x), expected)
    dense = layer.dense(torch.float32)
    assert isinstance(dense, OnlineLinear)
    assert torch.equal(dense(x), expected)
    assert torch.equal(dense.prepare_input(x), layer.prepare_input(x))


def test_group_size_must_divide() -> None:
    with pytest.raises(ValueError, match="does not divide 42"):
        QuantLinear(42, 20, W4)


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grid", [W4, W4_SYMMETRIC, W3_CHANNEL], ids=str)
def test_on_a_gpu_the_codes_are_multiplied(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake CUDA tensors, which need no device: one call of the kernel, nothing dense."""
    with FakeTensorMode():
        layer = QuantLinear(48, 20, grid, bias=True, device="cuda")
        # stands for the rotation, which copies a matrix to the device
        monkeypatch.setattr(layer, "prepare_input", torch.abs)
        x = torch.empty(2, 5, 48, dtype=torch.bfloat16, device="cuda")
        with Calls() as calls:
            y = layer(x)
        assert (y.shape, y.dtype, y.device.type) == ((2, 5, 20), x.dtype, "cuda")
        worked = [name for name in calls.names if name not in ("aten::view", "prim::device")]
        assert worked == ["aten::abs", "rotq::packed_linear"]


@pytest.mark.parametrize("grid", [W4, W4_SYMMETRIC], ids=str)
def test_a_gpu_gets_all_buffers(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        layer = QuantLinear(48, 20, grid, bias=True, device="cuda")
        found = Mock(wraps=packed_linear)
        monkeypatch.setattr("rotq.layers.packed_weight.packed_linear", found)
        layer(torch.empty(2, 48, device="cuda"))
    (_, words, scale, zero, bias), given = found.call_args
    assert given == {"bits": grid.bits}
    assert words is layer.weight_packed
    assert scale is layer.weight_scale
    assert zero is layer.weight_zero_point
    assert bias is layer.bias


def test_on_a_cpu_the_weight_is_unpacked() -> None:
    layer = QuantLinear.from_quantized(random_quantized(20, 40, W4))
    with Calls() as calls:
        layer(random_input(40))
    assert "rotq::packed_linear" not in calls.names


def test_plain_codes_are_packed_for_the_kernel() -> None:
    quantized = random_quantized(20, 40, PLAIN)
    plain = QuantLinear.from_quantized(quantized)
    assert plain.weight_packed is quantized.q_NK
    packed = QuantLinear.from_quantized(replace(quantized, grid=Grid(**vars(PLAIN))))
    x = random_input(40).requires_grad_(True)
    with Calls() as calls:
        y = plain(x)
    assert "rotq::packed_linear" in calls.names
    assert torch.equal(y, packed(x))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_are_those_of_the_dense_layer(
    dtype: torch.dtype, rounded: bool, rotated: bool
) -> None:
    quantized = random_quantized(20, 40, W4)
    layer = QuantLinear.from_quantized(
        quantized,
        torch.randn(20, generator=torch.Generator().manual_seed(2)).to(dtype),
        random_signs(40, 0) if rotated else None,
        ActivationGrid(bits=4, symmetric=False) if rounded else None,
    )
    dense = layer.dense(dtype).requires_grad_(True)
    dense.bias = torch.nn.Parameter(layer.bias.data.clone())
    layer.bias.requires_grad_(True)
    found = []
    for module in (layer, dense):
        x = random_input(40, dtype).requires_grad_(True)
        y = module(x)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y))
        found.append((y.detach(), x.grad, module.bias.grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_backward_pass_keeps_codes_and_no_dense_weight() -> None:
    layer = QuantLinear.from_quantized(random_quantized(64, 256, W4))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        layer(random_input(256).requires_grad_(True))
    assert any(tensor is layer.weight_packed for tensor in kept)
    assert not any(tensor.shape == (64, 256) for tensor in kept)


@pytest.mark.parametrize("learns", [False, True])
def test_autocast_is_as_for_the_dense_layer(learns: bool) -> None:
    layer = QuantLinear.from_quantized(random_quantized(20, 40, W4), torch.ones(20))
    x = random_input(40).requires_grad_(learns)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, layer.dense(torch.float32)(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_paths_on_a_cpu_need_no_dense_weight(dtype: torch.dtype) -> None:
    layer = QuantLinear.from_quantized(random_quantized(20, 40, PATHS), torch.ones(20).to(dtype))
    x = random_input(40, dtype)
    with Calls() as calls:
        y = layer(x)
    assert ("rotq::trellis_linear" in calls.names) == (dtype != torch.float64)
    torch.testing.assert_close(y, layer.dense(dtype)(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_gpu_and_cpu_agree(grid: Grid, rows: int) -> None:
    layer = QuantLinear.from_quantized(random_quantized(20, 40, grid), torch.ones(20))
    x = random_input(40)[0, :1].expand(rows, -1)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), layer.cpu()(x))


@pytest.mark.parametrize("grid", [W4, W4_SYMMETRIC, W3_CHANNEL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_rows_than_are_unpacked_at_once(grid: Grid, dtype: torch.dtype) -> None:
    quantized = random_quantized(ROWS_AT_ONCE + 5, 40, grid)
    layer = QuantLinear.from_quantized(quantized)
    assert torch.equal(layer.quantized().q_NK, quantized.q_NK)
    assert torch.equal(layer.dequantize(dtype), quantized.dequantize(dtype))
