"""The estimate against what a job really writes, and what trained parts add to it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_jobs import make_checkpoint
from tiny_models import MemorySource, tiny_model
from transformers import LlamaConfig

from rotq.models.skeleton import Skeleton
from rotq.quantize import estimate as estimates
from rotq.quantize.estimate import estimate, make_estimate
from rotq.recipe import load_recipe


def skeleton(name: str) -> Skeleton:
    return Skeleton.open(MemorySource(tiny_model(name, dtype=torch.float32)))


def recipe(**values: object):
    return load_recipe(None, {key.replace("__", "."): value for key, value in values.items()})


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-moe"])
@pytest.mark.parametrize("residual", ["none", "hadamard"])
def test_estimated_bytes_are_those_of_the_tensors(name: str, residual: str, tmp_path: Path):
    opened = skeleton(name)
    wanted = recipe(weights__group_size=-1, weights__bits=8, rotation__residual=residual)
    estimate = make_estimate(opened, wanted, torch.float32)
    linear = sum(site.shape[0] * site.shape[1] for site in estimate.sites)
    stored = sum(parameter.numel() for parameter in tiny_model(name).parameters())
    untied = 97 * 48 if name == "llama-tied" and residual == "hadamard" else 0
    # per output channel: a 32-bit scale and an 8-bit zero point
    packed = linear + sum(5 * site.shape[0] for site in estimate.sites)
    assert estimate.output_bytes == pytest.approx(packed + 4 * (stored + untied - linear), abs=64)


def test_training_a_basis_is_in_the_estimate_and_fits_a_small_gpu_for_7b():
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        architectures=["LlamaForCausalLM"],
    )
    large = Skeleton.open(SimpleNamespace(config=config, names=list, load=None))
    choices = {
        "calibration__num_samples": 64,
        "calibration__seq_len": 2048,
        "calibration__offload": True,
        "transform__scalings": ["up"],
    }
    needs = [
        make_estimate(large, recipe(**choices, **more), torch.bfloat16).peak_memory_bytes
        for more in (
            {"transform__method": "learned"},
            {"transform__method": "learned", "transform__seq_len": 16384},
        )
    ]
    assert needs[0] < 16e9
    # all hidden states between blocks, at least
    assert needs[1] > 33 * 16384 * 4096 * 2


LLAMA_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=2,
    num_attention_heads=64,
    num_key_value_heads=8,
    tie_word_embeddings=False,
    architectures=["LlamaForCausalLM"],
)


@pytest.mark.parametrize(
    ("changes", "room"),
    [
        ({"solver__method": "rtn"}, 2e9),
        ({"solver__refine_sweeps": 0}, 2.6e9),
        ({"solver__refine_sweeps": 0, "calibration__offload": True}, 2e9),
    ],
)
def test_a_block_of_70b_needs_little_more_than_itself_in_fp32(changes: object, room: float):
    large = Skeleton.open(SimpleNamespace(config=LLAMA_70B, names=list, load=None))
    choices = {"calibration__num_samples": 4, "calibration__seq_len": 128, **changes}
    choices |= {"calibration__batch_size": 1}
    choices |= {"solver__scale_search": "minmax", "solver__target_correction": 0.0}
    made = make_estimate(large, recipe(**choices), torch.bfloat16)
    block = sum(parameter.numel() for parameter in large.blocks[0].parameters())
    assert made.peak_memory_bytes < 4 * block + room


@pytest.mark.parametrize(("correction", "streams"), [(0.0, 1), (0.5, 2)])
def test_inputs_that_wait_for_a_large_hessian_are_on_the_scratch_disk(
    correction: float, streams: int
):
    large = Skeleton.open(SimpleNamespace(config=LLAMA_70B, names=list, load=None))
    choices = {"calibration__num_samples": 4, "calibration__seq_len": 128}
    choices |= {"solver__target_correction": correction}
    held, kept = (
        make_estimate(large, recipe(**choices, calibration__offload=on), torch.bfloat16)
        for on in (False, True)
    )
    # hidden states between blocks, and what o_proj and down_proj read; the end of the MLP
    wanted = 4 * 128 * 2 * (streams * (8192 + 8192 + 28672) + 28672)
    assert kept.scratch_disk_bytes - held.scratch_disk_bytes == wanted


def test_memory_that_is_short_is_told_with_what_saves_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = make_checkpoint(tmp_path / "model", num_layers=1)
    sizes = {"calibration__num_samples": 4, "calibration__seq_len": 64, "weights__group_size": 16}
    wanted = recipe(**sizes, calibration__batch_size=4)
    monkeypatch.setattr(estimates, "available_memory", lambda: 1000)
    found = estimate(model, wanted, device="cpu", processes=2)
    told = "\n".join(found.notes)
    assert "it needs" in told
    assert "calibration.offload=true saves" in told
    assert "--num-processes 1 saves" in told
    assert "with all of that it still needs" in told
    monkeypatch.setattr(estimates, "available_memory", lambda: 10**12)
    assert not any("it needs" in note for note in estimate(model, wanted, device="cpu").notes)


def test_time_is_predicted_by_phase_or_the_reason_is_told(tmp_path: Path):
    model = make_checkpoint(tmp_path / "model", num_layers=1)
    small = {"calibration__num_samples": 2, "calibration__seq_len": 32, "weights__group_size": 16}
    found = estimate(model, recipe(**small), device="cpu")
    assert found.seconds.keys() >= {"start", "load", "forward passes", "factor", "solving"}
    assert min(found.seconds.values()) >= 0
    assert found.wall_seconds == pytest.approx(sum(found.seconds.values()), rel=0.5)
    searched = recipe(**small, transform__method="optrot", rotation__residual="hadamard")
    found = estimate(model, searched, device="cpu")
    assert not found.seconds
    assert found.wall_seconds is None
    assert "no time is predicted with transform.method=optrot" in found.notes
