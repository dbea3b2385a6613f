"""What people do with a model of transformers, done with one whose weights are packed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import W4, W4_SYMMETRIC, write_checkpoint
from tiny_models import random_ids
from torch import Tensor

import rotq
from rotq.formats.activations import ActivationGrid
from rotq.layers.online_heads import OnlineHeads
from rotq.layers.quant_linear import QuantLinear

A8 = ActivationGrid(bits=8, symmetric=True)
ONLINE = {"rotated": True, "inputs": A8, "heads": OnlineHeads(rotated=True, grid=A8)}


@pytest.fixture(params=["plain", "online"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    options = ONLINE if request.param == "online" else {}
    return rotq.load(write_checkpoint(tmp_path, format="rotq", **options).path)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(random_ids(2, 9), use_cache=False).logits


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded]
)
def test_copies(model: Any, copied: Callable[[Any], Any]) -> None:
    again = copied(model)
    assert torch.equal(logits(again), logits(model))
    # the copy counts its own parameters
    number = model.num_parameters()
    again.lm_head = torch.nn.Identity()
    assert again.num_parameters() == number - model.lm_head.weight.numel()


@pytest.mark.parametrize("format", ["rotq", "compressed-tensors"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3-moe", "esm", "bert"])
def test_as_many_parameters_as_the_dense_model(tmp_path: Path, family: str, format: str) -> None:
    written = write_checkpoint(tmp_path, family, grids=(W4_SYMMETRIC,), format=format)
    model, dense = rotq.load(written.path), rotq.load(written.path, packed=False)
    for exclude in (False, True):
        found = model.num_parameters(exclude_embeddings=exclude)
        assert found == dense.num_parameters(exclude_embeddings=exclude)
    assert model.get_memory_footprint() < 0.6 * dense.get_memory_footprint()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_dtype_casts_no_codes_and_no_scales(model: Any, dtype: torch.dtype) -> None:
    stored = {n: t.clone() for n, t in model.named_buffers() if "weight_" in n or "signs" in n}
    model.to(dtype)
    assert model.dtype == logits(model).dtype == dtype
    for name, tensor in stored.items():
        assert torch.equal(model.get_buffer(name), tensor)
        assert model.get_buffer(name).dtype == tensor.dtype
    with pytest.raises(ValueError, match="not supported for quantized model"):
        model.half()


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_one_device(tmp_path: Path, device_map: Any) -> None:
    path = write_checkpoint(tmp_path, grids=(W4,)).path
    model = rotq.load(path, device_map=device_map)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    assert torch.equal(logits(model), logits(rotq.load(path)))


@pytest.mark.filterwarnings("ignore:.*lru_cache:UserWarning")
def test_compiled(model: Any) -> None:
    expected = logits(model)
    assert torch.equal(logits(torch.compile(model, backend="eager")), expected)
