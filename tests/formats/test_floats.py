"""Levels, codes and scales of small floats."""

from __future__ import annotations

import importlib

import pytest
import torch

from rotq.checkpoint.scheme_groups import FIELDS
from rotq.formats.floats import (
    E2M1,
    KINDS,
    float_grid,
    global_scale,
    nearest_e2m1_,
    pack_nibbles,
    power_of_two_scale,
    unpack_nibbles,
)
from rotq.layers.quant_linear import QuantLinear
from rotq.recipe import Solver
from rotq.recipe.sections import FLOATS
from rotq.solvers.solve import solve

THRESHOLDS = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4, 7.0: 6, 1e9: 6}


def test_every_code_has_its_level_and_back() -> None:
    grid = float_grid("nvfp4")
    code = torch.arange(16, dtype=torch.int8)[None]
    level = grid.levels(code)
    assert level[0].tolist() == [*E2M1, *(-value for value in E2M1)]
    assert torch.equal(grid.codes(level) % 8, code % 8)
    assert torch.equal(grid.codes(level)[level != 0], code[level != 0])


def test_every_code_of_fp8_has_its_level_and_back() -> None:
    grid = float_grid("fp8")
    code = torch.arange(-128, 128).to(torch.int8)[None]
    level = grid.levels(code)
    finite = level.isfinite()
    assert finite.sum() == 254
    assert torch.equal(grid.codes(level)[finite], code[finite])


@pytest.mark.parametrize("sign", [1, -1])
def test_halves_between_levels_go_to_the_even_place(sign: int) -> None:
    x = torch.tensor([sign * value for value in THRESHOLDS])
    assert nearest_e2m1_(x).abs().tolist() == list(THRESHOLDS.values())


def test_the_nearest_level_is_taken() -> None:
    x = torch.linspace(-8, 8, 4001)
    levels = torch.tensor([*E2M1, *(-value for value in E2M1)])
    distance = (x[:, None] - levels).abs().amin(1)
    assert torch.equal((nearest_e2m1_(x.clone()) - x).abs(), distance)


def test_nibbles_hold_what_was_packed() -> None:
    generator = torch.Generator().manual_seed(0)
    code_NK = torch.randint(0, 16, (5, 32), generator=generator).to(torch.int8)
    packed = pack_nibbles(code_NK)
    assert packed.shape == (5, 16)
    assert packed[0, 0].item() == code_NK[0, 0].item() + 16 * code_NK[0, 1].item()
    assert torch.equal(unpack_nibbles(packed), code_NK)


def test_powers_of_two_are_those_of_compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors")
    theirs = importlib.import_module("compressed_tensors.quantization.utils.mxfp_utils")
    top = torch.cat([torch.logspace(-20, 20, 999), torch.tensor([1.0, 1.75, 1.7499, 3.5, 7.0])])
    assert torch.equal(power_of_two_scale(top), 2.0 ** (theirs.generate_mx_scales(top) - 127))


@pytest.mark.parametrize(
    ("kind", "search", "limit"),
    [("nvfp4", "minmax", 0.0095), ("nvfp4", "mse", 0.0075), ("mxfp4", "mse", 0.0132)],
)
def test_normal_weights_lose_what_the_format_must(kind: str, search: str, limit: float) -> None:
    """Relative to their variance; the research has .0090, .0075 and .0125 to .0132."""
    weight_NK = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    grid = float_grid(kind)
    scale = global_scale(weight_NK.abs().max(), local=300) if grid.has_global_scale else None
    dtype = grid.scale_dtype
    assert dtype is not None
    solver = Solver(method="rtn", scale_search=search)  # type: ignore[arg-type]
    solved = solve(weight_NK, None, grid, solver, scale_dtype=dtype, global_scale=scale)
    error = (solved.quantized.dequantize() - weight_NK).square().mean() / weight_NK.square().mean()
    assert 0.8 * limit < error < limit
    assert torch.allclose(solved.loss_N.sum() / solved.energy_N.sum(), error, rtol=1e-4)


def test_gptq_on_floats_beats_rounding(tmp_path: object) -> None:
    from rotq.solvers.statistics import Moments

    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=generator)
    x_MK = torch.randn(512, 64, generator=generator) @ mix
    weight_NK = torch.randn(32, 64, generator=generator)
    moments = Moments(64, cross=False, device=torch.device("cpu"))
    moments.add(x_MK, None, None)
    grid, losses = float_grid("nvfp4"), {}
    scale = global_scale(weight_NK.abs().max(), local=300)
    for name, solver in {
        "rtn": Solver(method="rtn", scale_search="mse"),
        "gptq": Solver(damping=0.01),
        "refined": Solver(damping=0.01, refine_sweeps=3),
    }.items():
        dtype = torch.float8_e4m3fn
        solved = solve(weight_NK, moments, grid, solver, scale_dtype=dtype, global_scale=scale)
        assert solved.quantized.scale_NG.dtype == dtype
        losses[name] = solved.loss_N.sum().item()
    assert losses["refined"] < losses["gptq"] < 0.8 * losses["rtn"]


def test_blocks_are_those_of_compressed_tensors() -> None:
    """Bit by bit, the last rows being no whole block; each block's largest is at the top."""
    pytest.importorskip("compressed_tensors")
    naive = importlib.import_module("compressed_tensors.compressors.naive_quantized")
    schemes = importlib.import_module("compressed_tensors.quantization")
    weight_NK = torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    weight_NK[130, 5] = 9
    grid, solver = float_grid("fp8_block"), Solver(method="rtn", scale_search="minmax")
    solved = solve(weight_NK, None, grid, solver, scale_dtype=torch.bfloat16).quantized
    layer = QuantLinear.from_quantized(solved)
    assert layer.weight_scale.shape == (2, 2)
    tops = [part.abs().amax() for rows in weight_NK.split(128) for part in rows.split(128, dim=1)]
    assert torch.equal(layer.weight_scale.flatten(), (torch.stack(tops) / 448).bfloat16())
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=FIELDS["fp8_block"])
    state = {"weight": weight_NK, "weight_scale": layer.weight_scale}
    packed = naive.FloatQuantizationCompressor.compress(state, scheme)
    assert torch.equal(packed["weight"].view(torch.int8), layer.weight_packed.view(torch.int8))
    dense_NK = naive.FloatQuantizationCompressor.decompress(packed, scheme)["weight"]
    assert torch.equal(dense_NK, layer.dequantize(torch.bfloat16))
    assert grid.bits_per_weight(256) == pytest.approx(8 + 16 / 128**2)


def test_the_recipe_knows_the_same_formats() -> None:
    assert {kind: KINDS[kind] for kind in FLOATS} == FLOATS
