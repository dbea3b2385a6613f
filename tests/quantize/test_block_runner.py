"""Where the streams start, and what a pass over the windows collects."""

import dataclasses

import pytest
import torch
from memory_jobs import make_job

from rotq.calibration.batches import Batch
from rotq.calibration.capture import capture_inputs, run_block
from rotq.models.adapter import Site
from rotq.quantize.block_runner import BlockRunner
from rotq.quantize.token_weights import TokenWeights

PLAIN = {"weights.group_size": 16, "calibration.precision": "highest"}
CORRECTED = {**PLAIN, "solver.target_correction": 0.5}


def start(job):
    return BlockRunner(job).start(job.skeleton.load_outer(job.source, dtype=job.dtype))


def test_streams_are_as_many_as_the_recipe_needs(tmp_path):
    rtn = {**PLAIN, "solver.method": "rtn", "solver.scale_search": "minmax"}
    assert start(make_job(tmp_path / "none", rtn)) is None
    searched = {**rtn, "solver.scale_search": "hessian"}
    assert start(make_job(tmp_path / "searched", searched)).original is None
    assert start(make_job(tmp_path / "plain", PLAIN)).original is None
    both = start(make_job(tmp_path / "both", CORRECTED))
    assert torch.equal(both.original.hidden[0], both.quantized.hidden[0])
    both.quantized.hidden[0] = torch.zeros(3, 24, 48)
    assert both.original.hidden[0].abs().max() > 0


def test_offloaded_streams_are_files_of_the_job(tmp_path):
    start(make_job(tmp_path / "job", {**CORRECTED, "calibration.offload": True}))
    names = {file.name for file in (tmp_path / "job").iterdir()}
    kinds = ("hidden", "attention")
    both = {f"{kind}-{name}-0" for kind in kinds for name in ("quantized", "original")}
    assert names == both | {"mlp-quantized-0"}


@pytest.mark.parametrize("padded", [False, True])
def test_moments_are_those_of_what_the_layers_read(tmp_path, padded):
    job = make_job(tmp_path / "job", PLAIN)
    ids_BT = job.windows.ids_BT
    real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    if padded:
        real_BT[1:, 20:] = False
        batch = Batch(ids_BT=ids_BT, mask_BT=real_BT.long())
        job = dataclasses.replace(job, windows=dataclasses.replace(job.windows, batches=(batch,)))
    streams, block = start(job), job.load_block(0, job.dtype)
    site = Site(name="gate_up", linears=("mlp.gate_proj", "mlp.up_proj"))
    collected = BlockRunner(job).collect(0, (site,), (block, block), streams, None, last=True)
    hidden_BTD, mask_BT = streams.quantized.hidden[0], streams.batches[0].mask_BT
    kwargs = job.skeleton.block_kwargs(0, hidden_BTD, mask_BT)
    seen, _ = capture_inputs(block, ["mlp.gate_proj"], hidden_BTD, kwargs)
    x_MK = seen["mlp.gate_proj"][real_BT.flatten()].double()
    [sums] = collected.take("gate_up")
    assert sums.tokens == len(x_MK) == real_BT.sum()
    expected_KK = (x_MK.T @ x_MK / len(x_MK)).float()
    torch.testing.assert_close(sums.hessian_KK(), expected_KK, rtol=1e-4, atol=1e-4)


def test_weights_count_tokens_and_zero_leaves_one_out(tmp_path):
    job = make_job(tmp_path / "job", PLAIN)
    streams, block = start(job), job.load_block(0, job.dtype)
    weight_M2 = torch.ones(72, 2)
    weight_M2[:24, 0] = 0.0
    weights = TokenWeights(by_site={"": [weight_M2]})
    site = Site(name="qkv", linears=("self_attn.q_proj",))
    runner = BlockRunner(job)
    collected = runner.collect(0, (site,), (block, block), streams, weights, last=True)
    found, of_all = collected.take("qkv")
    assert found.weight_sum == 48
    assert of_all.weight_sum == 72
    hidden_BTD = streams.quantized.hidden[0]
    kwargs = job.skeleton.block_kwargs(0, hidden_BTD)
    seen, _ = capture_inputs(block, ["self_attn.q_proj"], hidden_BTD, kwargs)
    x_MK = seen["self_attn.q_proj"][24:].double()
    # of a sum over 48 tokens, the mean over 72
    ratio = found.hessian_KK() / (x_MK.T @ x_MK).float()
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("offload", "runs"), [(False, 2), (True, 1)])
def test_the_mlp_before_its_last_layer_is_run_once_where_its_end_is_on_the_disk(
    tmp_path, offload, runs
):
    job = make_job(tmp_path / "job", {**PLAIN, "calibration.offload": offload})
    streams, block, runner = start(job), job.load_block(0, job.dtype), BlockRunner(job)
    hidden_BTD, calls = streams.quantized.hidden[0], []
    expected_BTD = run_block(block, hidden_BTD, job.skeleton.block_kwargs(0, hidden_BTD))
    block.mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    site = Site(name="down", linears=("mlp.down_proj",))
    runner.collect(0, (site,), (block, block), streams, None, last=True)
    runner.advance(0, block, streams.quantized)
    assert len(calls) == runs * len(streams.batches)
    assert torch.equal(streams.quantized.hidden[0], expected_BTD)


def test_what_unrounded_layers_decide_is_not_remembered(tmp_path):
    job = make_job(tmp_path / "job", {**PLAIN, "calibration.offload": True})
    streams, block = start(job), job.load_block(0, job.dtype)
    linears = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for names in (("self_attn.q_proj",), ("mlp.gate_proj", "mlp.up_proj"), linears):
        stage = tuple(Site(name=name, linears=(name,)) for name in names)
        BlockRunner(job).collect(0, stage, (block, block), streams, None, last=False)
        assert streams.quantized.remembered("mlp", 0) is None
