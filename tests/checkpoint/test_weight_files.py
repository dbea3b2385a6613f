"""Every reader takes the same files, those that transformers takes, and none outside the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_model
from transformers import AutoModelForCausalLM

from rotq.checkpoint.load import load_model
from rotq.checkpoint.opening import open_source
from rotq.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME, find_entries
from rotq.errors import RotqError


def save(folder: Path, seed: int = 0, **options: object) -> Path:
    tiny_model("llama", seed=seed, dtype=torch.float32).save_pretrained(folder, **options)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(random_ids(1, 8), use_cache=False).logits


def both(folder: Path) -> Path:
    """New weights in one file, and older ones in shards beside it."""
    model = save(folder / "model", seed=1)
    old = save(folder / "old", seed=2, max_shard_size="40KB")
    for file in old.glob("model*"):
        shutil.copy(file, model / file.name)
    return model


def named(folder: Path) -> Path:
    """Weights under another name, which config.json says, beside older ones under the usual."""
    model = save(folder / "model", seed=1)
    (model / SINGLE_NAME).rename(model / "new.safetensors")
    save(folder / "old", seed=2)
    shutil.copy(folder / "old" / SINGLE_NAME, model / SINGLE_NAME)
    config = json.loads((model / "config.json").read_text())
    config["transformers_weights"] = "new.safetensors"
    (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("make", [both, named])
def test_jobs_and_evaluation_read_what_transformers_reads(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    model = make(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(model).eval()
    expected = theirs.state_dict()
    assert torch.equal(logits(load_model(model)), logits(theirs))
    source = open_source(model)
    assert all(torch.equal(source.load(name), expected[name]) for name in source.names())
    assert torch.equal(expected["model.norm.weight"], tiny_weights(seed=1)["model.norm.weight"])


def tiny_weights(seed: int) -> dict[str, torch.Tensor]:
    return tiny_model("llama", seed=seed, dtype=torch.float32).state_dict()


def elsewhere(model: Path) -> Path:
    """The weights, moved out of the folder."""
    (model / SINGLE_NAME).rename(model.parent / "private.safetensors")
    return model.parent / "private.safetensors"


def parent(model: Path) -> str:
    elsewhere(model)
    return "../private.safetensors"


def absolute(model: Path) -> str:
    return str(elsewhere(model))


def through_a_linked_folder(model: Path) -> str:
    (model / "shards").symlink_to(elsewhere(model).parent, target_is_directory=True)
    return "shards/private.safetensors"


def down_and_up(model: Path) -> str:
    elsewhere(model)
    (model / "shards").mkdir()
    return "shards/../../private.safetensors"


OUTSIDE = [parent, absolute, through_a_linked_folder, down_and_up]


@pytest.mark.parametrize("place", OUTSIDE)
@pytest.mark.parametrize("reader", [open_source, load_model])
def test_an_index_does_not_lead_out_of_the_folder(
    tmp_path: Path, place: Callable[[Path], str], reader: Callable[[Path], object]
) -> None:
    model = save(tmp_path / "model")
    names = [entry.name for entry in find_entries(model)]
    name = place(model)
    weight_map = dict.fromkeys(names, name)
    (model / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(RotqError, match="not inside") as caught:
        reader(model)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", OUTSIDE)
def test_nor_does_the_configuration(tmp_path: Path, place: Callable[[Path], str]) -> None:
    model = save(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["transformers_weights"] = place(model)
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(RotqError, match="not inside"):
        open_source(model)


def test_files_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    model = save(tmp_path / "model", max_shard_size="40KB")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / str(number))
    assert torch.equal(logits(load_model(model)), logits(tiny_model("llama", dtype=torch.float32)))
    assert len(open_source(model).names()) == len(tiny_weights(seed=0))


@pytest.mark.parametrize(
    ("place", "message"), [(5, "is no file name"), (None, "is no file name"), ("\0", "not inside")]
)
def test_places_that_are_none(tmp_path: Path, place: object, message: str) -> None:
    model = save(tmp_path / "model")
    (model / SINGLE_NAME).unlink()
    (model / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": {"a": place}}))
    with pytest.raises(RotqError, match=message):
        open_source(model)


def test_a_file_of_another_name_is_pointed_at(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    (model / SINGLE_NAME).rename(model / "consolidated.safetensors")
    with pytest.raises(RotqError, match=r"consolidated\.safetensors, which transformers does not"):
        open_source(model)


def test_pickled_weights_are_still_evaluated(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    (model / SINGLE_NAME).unlink()
    torch.save(tiny_weights(seed=0), model / "pytorch_model.bin")
    assert torch.equal(logits(load_model(model)), logits(tiny_model("llama", dtype=torch.float32)))
