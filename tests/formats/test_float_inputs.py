"""Activations rounded to small floats: as compressed-tensors rounds them, and with a gradient."""

from __future__ import annotations

import importlib

import pytest
import torch

from rotq.checkpoint.scheme_groups import INPUT_FIELDS
from rotq.formats.float_inputs import float_inputs, round_floats
from rotq.formats.floats import global_scale


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "fp8_block"])
def test_rounding_is_that_of_compressed_tensors(kind: str) -> None:
    pytest.importorskip("compressed_tensors")
    quantization = importlib.import_module("compressed_tensors.quantization")
    forward = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    x = torch.randn(3, 7, 256, generator=torch.Generator().manual_seed(0))
    x[0, 0, :128] = 0
    x[0, 1] *= 1e-3
    inputs = float_inputs(kind)
    dtype = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8}.get(kind)
    args = quantization.QuantizationArgs(
        **INPUT_FIELDS[kind],
        dynamic="local" if inputs.has_global_scale else True,
        scale_dtype=dtype,
        zp_dtype=dtype,
    )
    module = torch.nn.Module()
    module.quantization_status = quantization.QuantizationStatus.COMPRESSED  # type: ignore[assignment]
    scale = global_scale(x.abs().max()) if inputs.has_global_scale else None
    module.input_global_scale = scale  # type: ignore[assignment]
    theirs = forward.forward_quantize(module, x, "input", args)
    assert torch.equal(round_floats(x, inputs, scale), theirs)


def test_a_token_is_rounded_to_fp8() -> None:
    x = torch.tensor([[448.0, 1.03, -0.4, 0.0]])
    wanted = torch.tensor([[448.0, 1.0, -0.40625, 0.0]])
    assert torch.equal(round_floats(x, float_inputs("fp8")), wanted)


def test_what_is_beyond_the_range_of_calibration_is_clipped() -> None:
    scale = global_scale(torch.tensor(6.0))
    x = torch.full((1, 16), 12.0)
    assert torch.allclose(round_floats(x, float_inputs("nvfp4"), scale), torch.full((1, 16), 6.0))


def test_slopes_pass_unchanged() -> None:
    x = torch.randn(2, 32, requires_grad=True)
    round_floats(x, float_inputs("mxfp4")).mul(torch.arange(32.0)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.arange(32.0).expand(2, 32))


def test_a_missing_global_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a global scale"):
        round_floats(torch.ones(1, 16), float_inputs("nvfp4"))
