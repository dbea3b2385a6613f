"""Opening checkpoints: what is read, what it costs, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import write_checkpoint
from tiny_models import tiny_model

from rotq.checkpoint.opening import open_source
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import save_tensors
from rotq.checkpoint.weight_files import INDEX_NAME
from rotq.errors import RotqError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_model("llama", dtype=torch.float32).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_model("llama", dtype=torch.float32).save_pretrained(path, max_shard_size="40KB")
    assert (path / INDEX_NAME).is_file()
    return path


@pytest.mark.parametrize("kind", ["checkpoint", "sharded"])
def test_every_tensor_is_read_bit_by_bit(kind: str, request: pytest.FixtureRequest) -> None:
    source = open_source(request.getfixturevalue(kind))
    expected = tiny_model("llama", dtype=torch.float32).state_dict()
    assert source.names() == sorted(expected)
    for name, tensor in expected.items():
        loaded = source.load(name)
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)


def test_config_dtype_and_tokenizer(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    assert source.config.model_type == "llama"
    assert source.dtype == torch.float32
    assert source.tokenizer_files() == [checkpoint / "tokenizer.json"]


@pytest.mark.parametrize("declared", [None, "bfloat16"])
def test_dtype_without_and_against_the_weights(checkpoint: Path, declared: str | None) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("dtype")
    (checkpoint / "config.json").write_text(json.dumps(config | {"dtype": declared}))
    expected = torch.float32 if declared is None else torch.bfloat16
    assert open_source(checkpoint).dtype == expected


def test_renames_go_there_and_back(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, "mixtral")
    source = open_source(written.source)
    stored = "model.layers.0.block_sparse_moe.experts.3.w3"
    assert f"{stored}.weight" in source.names()
    ours = "model.layers.0.mlp.experts.3.up_proj"
    renamed = source.renamed(
        [(r"\.block_sparse_moe\.experts\.(\d+)\.w3", r".mlp.experts.\1.up_proj")]
    )
    assert torch.equal(renamed.load(f"{ours}.weight"), source.load(f"{stored}.weight"))
    assert renamed.stored_name(f"{ours}.weight") == f"{stored}.weight"
    assert renamed.stored_name(f"{ours}.weight_packed") == f"{stored}.weight_packed"
    assert renamed.stored_name("model.norm.weight") == "model.norm.weight"
    assert renamed.stored_name("lm_head.input_signs") == "lm_head.input_signs"


def test_renames_must_not_collide(checkpoint: Path) -> None:
    with pytest.raises(RotqError, match="would both be read as"):
        open_source(checkpoint).renamed([(r"layers\.\d", "layers.0")])


def test_fingerprint_follows_weights_and_config(checkpoint: Path) -> None:
    first = open_source(checkpoint).fingerprint()
    assert first == open_source(checkpoint).fingerprint()
    config = checkpoint / "config.json"
    config.write_text(config.read_text() + "\n")
    second = open_source(checkpoint).fingerprint()
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert len({first, second, open_source(checkpoint).fingerprint()}) == 3


MEASURE = """
import resource, sys
from pathlib import Path
from rotq.checkpoint.opening import open_source
source = open_source(Path(sys.argv[1]))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
source.load("small")
before = peak()
for name in source.names():
    source.load(name)
print(peak() - before)
"""


def test_loading_leaves_no_memory_behind(checkpoint: Path) -> None:
    """Twelve tensors of 16 MB one after another: the peak grows by about one."""
    tensors = {f"t{i}": torch.ones(4_000_000) for i in range(12)}
    save_tensors(checkpoint / "model.safetensors", tensors | {"small": torch.ones(1)})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(checkpoint)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 40e6


def rewrite(path: Path, name: str, value: float) -> None:
    file = path / "model.safetensors"
    source = open_source(path)
    tensors = {entry.name: source.load(entry.name) for entry in read_entries(file)}
    tensors[name].view(-1)[-1] = value
    save_tensors(file, tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_that_are_not_finite_are_named(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    tiny_model("llama", dtype=dtype).save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, name, value)
    source = open_source(tmp_path)
    with pytest.raises(RotqError, match=f"{name} holds NaN or infinite"):
        source.load(name)
    source.load("model.norm.weight")


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def cut_header(path: Path) -> None:
    os.truncate(path / "model.safetensors", 50)


def only_a_length(path: Path) -> None:
    os.truncate(path / "model.safetensors", 4)


def garbage(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"this is not json" + bytes(64))


def not_an_object(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"[1, 2]  ")


def edit_header(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + length :])


def wrong_shape(path: Path) -> None:
    edit_header(path, lambda header: header["model.norm.weight"].update(shape=[49]))


def overlap(path: Path) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        header["model.norm.weight"]["data_offsets"] = [0, 48 * 4]

    edit_header(path, change)


def no_shape(path: Path) -> None:
    edit_header(path, lambda header: header["model.norm.weight"].pop("shape"))


def other_dtype(path: Path) -> None:
    edit_header(path, lambda header: header["model.norm.weight"].update(dtype="F4"))


def longer(path: Path) -> None:
    with open(path / "model.safetensors", "ab") as file:
        file.write(b"more")


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def broken_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def unknown_model(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "nosuchmodel"}')


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def quantized(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (path / "config.json").write_text(json.dumps(config))


def quantized_oddly(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": "int4"}))


def fp8(path: Path) -> None:
    def change(header: dict[str, dict[str, object]]) -> None:
        header["model.norm.weight"].update(dtype="F8_E4M3", shape=[48 * 4])

    edit_header(path, change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors is truncated: "),
        (cut_header, "truncated in its header"),
        (only_a_length, "truncated in its header"),
        (garbage, "header is not JSON"),
        (not_an_object, "not a JSON object"),
        (wrong_shape, "entry for model.norm.weight does not add up"),
        (overlap, "starts at the wrong offset"),
        (no_shape, "entry for model.norm.weight is not valid"),
        (other_dtype, "model.norm.weight is stored as F4"),
        (longer, "is corrupt: "),
        (no_config, "has no config.json"),
        (broken_config, "config.json is not JSON"),
        (unknown_model, "config.json: .*nosuchmodel"),
        (no_weights, "no model.safetensors"),
        (pickled, "pytorch_model.bin must be converted"),
        (quantized, r"already quantized \(gptq\)"),
        (quantized_oddly, r"already quantized \(int4\)"),
        (fp8, "F8_E4M3; a dense checkpoint"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(checkpoint)
    with pytest.raises(RotqError, match=message) as caught:
        open_source(checkpoint)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_tensor(checkpoint: Path) -> None:
    with pytest.raises(RotqError, match="does not exist"):
        open_source(checkpoint / "none")
    with pytest.raises(RotqError, match="no tensor nothing"):
        open_source(checkpoint).load("nothing")


def test_file_that_shrinks_after_opening(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    last = max(source.entries.values(), key=lambda entry: entry.start)
    truncate(checkpoint)
    with pytest.raises(RotqError, match=f"{last.name} is cut off"):
        source.load(last.name)


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(RotqError, match=f"lacks the shard {shard.name}"):
        open_source(sharded)


def test_index_that_names_too_much(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(RotqError, match=r"lacks the tensor model\.extra"):
        open_source(sharded)


def test_index_without_a_map(sharded: Path) -> None:
    (sharded / INDEX_NAME).write_text("{}")
    with pytest.raises(RotqError, match="no weight_map"):
        open_source(sharded)
