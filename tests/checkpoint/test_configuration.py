"""The dtype of a checkpoint is read as transformers reads it, and only where none was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_model

from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.checkpoint.opening import open_source
from rotq.checkpoint.shards import save_tensors
from rotq.errors import RotqError


def make(folder: Path, declared: Any, dtype: torch.dtype, key: str = "dtype") -> Path:
    """A checkpoint whose config.json says ``declared`` and whose tensors are of ``dtype``."""
    tiny_model("llama", dtype=dtype).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config | {key: declared}))
    return folder


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("declared", ["auto", None])
def test_without_a_declared_one_the_tensors_decide(tmp_path: Path, declared: Any, key: str) -> None:
    model = make(tmp_path, declared, torch.bfloat16, key)
    assert open_source(model).dtype == torch.bfloat16
    assert load_model(model).dtype == torch.bfloat16
    assert load_model(model, dtype=torch.float32).dtype == torch.float32
    assert load_model(model, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("declared", ["int7", "torch.bfloat16", "float8_e4m3fn", 16, ["float32"]])
def test_a_dtype_that_is_none_is_named_unless_one_is_given(tmp_path: Path, declared: Any) -> None:
    model = make(tmp_path, declared, torch.float32)
    assert load_model(model, dtype="float16").dtype == torch.float16
    for read in (load_model, lambda path: open_source(path).dtype):
        with pytest.raises(RotqError, match=r"config\.json: dtype .* --dtype") as caught:
            read(model)
        assert repr(declared) in str(caught.value)


def test_tokenizers_do_not_stumble_over_it(tmp_path: Path) -> None:
    model = make(tmp_path, "auto", torch.float32)
    (model / "vocab.json").write_text('{"a": 0}')
    (model / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "GPT2Tokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(model)("a")["input_ids"] == [0]


def test_the_first_floating_point_tensor_of_the_first_file(tmp_path: Path) -> None:
    model = make(tmp_path, None, torch.float16)
    tensors = {name: open_source(model).load(name) for name in open_source(model).names()}
    mixed = {name: tensor.float() for name, tensor in tensors.items() if name > "model.layers"}
    save_tensors(model / "model.safetensors", tensors | mixed | {"a": torch.zeros(1).long()})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto").dtype
    assert open_source(model).dtype == theirs == torch.float16


def test_the_whole_models_dtype_comes_before_its_parts(tmp_path: Path) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 32, "dtype": "float16"}
    config = transformers.Gemma3Config(text_config=text, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    save_tensors(tmp_path / "model.safetensors", {"a": torch.zeros(1)})
    assert open_source(tmp_path).dtype == torch.bfloat16
