"""A tied matrix is found under whichever of its names the files have."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_ids, tiny_model

from rotq.checkpoint.load import load_model
from rotq.checkpoint.opening import open_source
from rotq.errors import RotqError
from rotq.models.skeleton import Skeleton

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def stored_as(folder: Path, *names: str) -> torch.Tensor:
    """Save a tied model with its shared matrix under these names; returns the matrix."""
    tiny_model("llama-tied", dtype=torch.float32).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    matrix = tensors.pop(EMBEDDING)
    assert HEAD not in tensors
    tensors |= {name: matrix.clone() for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return matrix


@pytest.mark.parametrize("names", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD]])
def test_a_job_finds_it_as_transformers_does(tmp_path: Path, names: list[str]) -> None:
    matrix = stored_as(tmp_path, *names)
    source = open_source(tmp_path)
    skeleton = Skeleton.open(source)
    outer = skeleton.load_outer(source.read_for(skeleton), dtype=torch.float32)
    assert torch.equal(outer[EMBEDDING], matrix)
    assert HEAD not in outer
    with torch.no_grad():
        logits_BTV = load_model(tmp_path)(random_ids(1, 5)).logits
        wanted_BTV = tiny_model("llama-tied", dtype=torch.float32)(random_ids(1, 5)).logits
    assert torch.equal(logits_BTV, wanted_BTV)


def test_without_any_it_is_missing(tmp_path: Path) -> None:
    stored_as(tmp_path)
    source = open_source(tmp_path)
    with pytest.raises(RotqError, match=rf"no tensor {EMBEDDING}"):
        source.read_for(Skeleton.open(source))
