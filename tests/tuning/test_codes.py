"""Codes trained on a block's output: where they start, their slopes, and that the loss falls."""

import copy

import pytest
import torch
from memory_jobs import make_job

from rotq.errors import RotqError
from rotq.formats.integer import Grid
from rotq.quantize.block_quantizer import BlockQuantizer
from rotq.quantize.block_runner import BlockRunner
from rotq.recipe import Solver
from rotq.solvers.solve import solve
from rotq.tuning import codes
from rotq.tuning.codes import TrainedLayer

CHOICES = {
    "weights.bits": 2,
    "weights.group_size": 16,
    "calibration.precision": "highest",
    "tuning.code_steps": 24,
}


@pytest.fixture(params=[True, False], ids=["symmetric", "asymmetric"])
def layer(request):
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(6, 32, generator=generator)
    grid = Grid(bits=3, group_size=16, symmetric=request.param)
    options = Solver(method="rtn", scale_search="minmax")
    solved = solve(weight_NK, None, grid, options, scale_dtype=torch.float16)
    return TrainedLayer(weight_NK, solved.quantized)


def test_training_starts_at_what_was_solved(layer):
    before, after = layer.solved, layer.quantized()
    assert torch.equal(after.q_NK, before.q_NK)
    assert torch.equal(after.scale_NG, before.scale_NG)
    assert torch.equal(layer.weight(torch.float32), before.dequantize())
    offset_NK = layer.code_NK - before.q_NK.float()
    assert offset_NK.abs().max() <= 0.4501
    assert offset_NK.std() > 0.1


def test_slopes_pass_the_rounding_and_stop_outside_of_the_grid(layer):
    grid = layer.solved.grid
    with torch.no_grad():
        layer.code_NK[0, 0], layer.code_NK[0, 1] = grid.q_max + 0.6, grid.q_min - 0.6
    slope_NK = torch.randn(6, 32)
    layer.weight(torch.float32).backward(slope_NK)
    scale_NK = layer.scale_NG.repeat_interleave(16, dim=1)
    expected_NK = slope_NK * scale_NK
    expected_NK[0, :2] = 0.0
    torch.testing.assert_close(layer.code_NK.grad, expected_NK)
    weight_NGg = layer.weight(torch.float32).detach().unflatten(1, (2, 16))
    expected_NG = (weight_NGg * slope_NK.unflatten(1, (2, 16))).sum(-1)
    torch.testing.assert_close(layer.change_NG.grad, expected_NG)


def quantized(folder, **changes):
    job = make_job(folder, {**CHOICES, **changes})
    with torch.no_grad():
        streams = BlockRunner(job).start(job.skeleton.load_outer(job.source, dtype=job.dtype))
        original = job.load_block(0, job.dtype)
        given_BTD = copy.copy(streams.quantized.hidden[0])
        found = BlockQuantizer(job).quantize(0, copy.deepcopy(original), streams)
        kwargs = job.skeleton.block_kwargs(0, given_BTD)
        wanted_BTD, found_BTD = original(given_BTD, **kwargs), found.block(given_BTD, **kwargs)
    error_BT = (found_BTD - wanted_BTD).square().sum(-1) / wanted_BTD.square().sum(-1)
    return found, error_BT.mean()


def _codes(block, path):
    return block.packed[path].quantized().q_NK


def test_training_lowers_the_blocks_error_and_moves_codes(tmp_path):
    plain, error = quantized(tmp_path / "plain", **{"tuning.code_steps": 0})
    trained, lower = quantized(tmp_path / "trained")
    assert lower < 0.85 * error
    assert trained.training["loss_last"] < trained.training["loss_first"]
    assert plain.training == {}
    moved = [(_codes(trained, path) != _codes(plain, path)).float().mean() for path in plain.packed]
    assert all(0.005 < share < 0.5 for share in moved)


def test_the_stream_goes_through_the_block_as_it_was_trained(tmp_path):
    """What its attention came to before is not replayed."""
    job = make_job(tmp_path / "job", CHOICES)
    with torch.no_grad():
        streams = BlockRunner(job).start(job.skeleton.load_outer(job.source, dtype=job.dtype))
        given_BTD = streams.quantized.hidden[0].clone()
        found = BlockQuantizer(job).quantize(0, job.load_block(0, job.dtype), streams)
        BlockRunner(job).advance(0, found.block, streams.quantized)
        wanted_BTD = found.block(given_BTD, **job.skeleton.block_kwargs(0, given_BTD))
    assert torch.equal(streams.quantized.hidden[0], wanted_BTD)


def test_what_is_stored_is_what_the_block_computes_with(tmp_path):
    trained, _ = quantized(tmp_path / "job")
    for path, codes_of in trained.packed.items():
        weight_NK = trained.block.get_submodule(path).weight
        assert torch.equal(weight_NK, codes_of.dequantize(weight_NK.dtype))


def test_a_loss_that_is_not_finite_names_the_block(tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "_loss", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(RotqError, match=r"model\.layers\.0: training codes, the loss is nan"):
        quantized(tmp_path / "job")
