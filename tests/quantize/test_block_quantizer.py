"""One block alone: what is saved is what is restored, and where the streams are behind it."""

import copy

import pytest
import torch
from memory_jobs import make_job

from rotq.checkpoint.safetensors import read_entries
from rotq.job.marks import is_ours
from rotq.job.part_names import block_part
from rotq.job.parts import restored_block
from rotq.layers.online_linear import OnlineLinear
from rotq.quantize.block_quantizer import BlockQuantizer
from rotq.quantize.collected import Collected
from rotq.quantize.quantized_block import save_block

W3 = {
    "weights.bits": 3,
    "weights.group_size": 16,
    "solver.target_correction": 0.5,
    "solver.refine_sweeps": 1,
    "calibration.precision": "highest",
}
PLAIN = {**W3, "solver.target_correction": 0.0, "solver.scale_search": "minmax"}
PLAIN["solver.refine_sweeps"] = 0
ROUNDED = {**W3, "activations.bits": 4, "kv_cache.bits": 4, "output.format": "rotq"}


def quantized_first_block(job):
    """The block as it was, what became of it, and the streams behind it."""
    quantizer = BlockQuantizer(job)
    streams = quantizer.runner.start(job.skeleton.load_outer(job.source, dtype=job.dtype))
    original = job.load_block(0, job.dtype)
    return original, quantizer.quantize(0, original, streams), streams


@pytest.mark.parametrize("choices", [W3, ROUNDED], ids=["dense inputs", "rounded inputs"])
def test_a_saved_block_is_restored_bit_for_bit(tmp_path, choices):
    job = make_job(tmp_path / "job", choices)
    original, quantized, _ = quantized_first_block(job)
    save_block(job, 0, quantized, {}, 1.5)
    assert job.folder.finished(block_part(0))
    assert job.folder.results(block_part(0))["seconds"] == 1.5
    restored = restored_block(job, job.folder.part(block_part(0)), 0, original)
    found, expected = restored.state_dict(), quantized.block.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    rounds = isinstance(restored.mlp.down_proj, OnlineLinear)
    assert rounds == ("activations.bits" in choices)


def test_a_part_holds_codes_in_place_of_weights(tmp_path):
    job = make_job(
        tmp_path / "job", {**W3, "weights.overrides": [{"match": "o_proj", "keep": True}]}
    )
    _, quantized, _ = quantized_first_block(job)
    save_block(job, 0, quantized, {}, 0.0)
    names = {entry.name for entry in read_entries(job.folder.part(block_part(0)))}
    prefix = "model.layers.0"
    assert f"{prefix}.mlp.up_proj.weight_packed" in names
    assert f"{prefix}.mlp.up_proj.weight" not in names
    assert f"{prefix}.self_attn.o_proj.weight" in names
    assert f"{prefix}.input_layernorm.weight" in names


def test_the_original_is_left_alone_and_its_stream_is_behind_the_block(tmp_path):
    job = make_job(tmp_path / "job", W3)
    outer = job.skeleton.load_outer(job.source, dtype=job.dtype)
    before = copy.deepcopy(job.load_block(0, job.dtype).state_dict())
    original, quantized, streams = quantized_first_block(job)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    hidden_BTD = job.skeleton.embed(outer, job.windows.ids_BT)
    kwargs = job.skeleton.block_kwargs(0, hidden_BTD)
    torch.testing.assert_close(streams.original.hidden[0], original(hidden_BTD, **kwargs))
    # the quantized one stands before the block until the finished block is run
    assert torch.equal(streams.quantized.hidden[0], hidden_BTD)
    runner = BlockQuantizer(job).runner
    runner.advance(0, quantized.block, streams.quantized)
    torch.testing.assert_close(streams.quantized.hidden[0], quantized.block(hidden_BTD, **kwargs))


@pytest.mark.parametrize("choices", [W3, PLAIN], ids=["two", "one"])
def test_weights_that_are_given_up_for_a_solve_are_there_after_it(tmp_path, monkeypatch, choices):
    _, expected, _ = quantized_first_block(make_job(tmp_path / "held", choices))
    monkeypatch.setattr("rotq.quantize.rounded_weights.LARGE_HESSIAN", 0)
    _, found, _ = quantized_first_block(make_job(tmp_path / "given-up", choices))
    for name, tensor in expected.block.state_dict().items():
        assert torch.equal(found.block.state_dict()[name], tensor), name


@pytest.mark.parametrize("choices", [W3, PLAIN], ids=["two", "one"])
def test_inputs_kept_on_the_disk_give_the_same_moments(tmp_path, monkeypatch, choices):
    offloaded = {**choices, "calibration.offload": True}
    _, expected, _ = quantized_first_block(make_job(tmp_path / "summed", offloaded))
    monkeypatch.setattr("rotq.quantize.rounded_weights.LARGE_HESSIAN", 0)
    kept = set()
    take = Collected.take

    def watched(self, name):
        kept.update(file.name for file in (tmp_path / "kept").glob("inputs-*"))
        return take(self, name)

    monkeypatch.setattr(Collected, "take", watched)
    _, found, _ = quantized_first_block(make_job(tmp_path / "kept", offloaded))
    assert {name.split("-")[1] for name in kept} >= {"qkv", "down"}
    assert all(is_ours(name) for name in kept)
    assert not list((tmp_path / "kept").glob("inputs-*"))
    for name, tensor in expected.block.state_dict().items():
        assert torch.equal(found.block.state_dict()[name], tensor), name


def test_a_block_with_one_stream_is_rounded_where_it_is(tmp_path):
    original, quantized, _ = quantized_first_block(make_job(tmp_path / "job", PLAIN))
    assert quantized.block is original
    original, quantized, _ = quantized_first_block(make_job(tmp_path / "two", W3))
    assert quantized.block is not original
    assert quantized.block.input_layernorm.weight is original.input_layernorm.weight
    assert not torch.equal(quantized.block.mlp.up_proj.weight, original.mlp.up_proj.weight)
