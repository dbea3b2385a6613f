"""The estimate against what a job really writes, and what trained parts add to it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import MemorySource, tiny_model
from transformers import LlamaConfig

from rotq.models.skeleton import Skeleton
from rotq.quantize.estimate import make_estimate
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
