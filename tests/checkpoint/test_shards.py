"""Writing files whole, merging them by bytes, and what a full disk leaves behind."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rotq.checkpoint.files import write_text
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.shards import assemble, save_tensors
from rotq.errors import RotqError

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4).T,
    "a.codes": torch.tensor([[-1, 2, 3]], dtype=torch.int8),
    "a.words": torch.tensor([7, -7], dtype=torch.int32),
    "a.shape": torch.tensor([3, 4]),
    "c.half": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).half(),
    "c.brain": torch.ones(3).bfloat16(),
    "c.scalar": torch.tensor(2.5, dtype=torch.float64),
    "c.empty": torch.empty(0, 4),
    "c.flag": torch.tensor([True, False]),
}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


def test_the_library_reads_what_is_saved(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"block": "3"})
    assert_same(load_file(tmp_path / "x.safetensors"), TENSORS)
    assert list(tmp_path.iterdir()) == [tmp_path / "x.safetensors"]


def test_bytes_do_not_depend_on_order(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", TENSORS)
    save_tensors(tmp_path / "y", dict(reversed(TENSORS.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", TENSORS)
    for entry in read_entries(tmp_path / "x"):
        assert entry.start % TENSORS[entry.name].element_size() == 0


def write_parts(folder: Path) -> list[Path]:
    names = sorted(TENSORS)
    parts = []
    for number in range(3):
        path = folder / f"part{number}.safetensors"
        # written by the library: assemble must not depend on our own order
        save_file({name: TENSORS[name].contiguous() for name in names[number::3]}, path)
        parts.append(path)
    return parts


@pytest.mark.parametrize("reverse", [False, True])
def test_one_file(tmp_path: Path, reverse: bool) -> None:
    parts = write_parts(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    written = assemble(parts[::-1] if reverse else parts, out, 10**9)
    assert written == [out / "model.safetensors"]
    assert_same(load_file(written[0]), TENSORS)
    save_tensors(tmp_path / "direct", TENSORS)
    assert written[0].read_bytes() == (tmp_path / "direct").read_bytes()


def test_shards_and_index(tmp_path: Path) -> None:
    layers = {f"layers.{i}.w": torch.full((4,), float(i)) for i in range(11)}
    save_tensors(tmp_path / "part", layers)
    written = assemble([tmp_path / "part"], tmp_path, 48)
    shards, index = written[:-1], json.loads(written[-1].read_text())
    assert [path.name for path in shards] == [
        f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)
    ]
    # natural order: layers.2 lies before layers.10
    assert sorted(load_file(shards[0])) == ["layers.0.w", "layers.1.w", "layers.2.w"]
    assert index["metadata"] == {"total_size": 11 * 16}
    assert set(index["weight_map"]) == set(layers)
    merged: dict[str, torch.Tensor] = {}
    for name, file in index["weight_map"].items():
        merged[name] = load_file(tmp_path / file)[name]
    assert_same(merged, layers)


def test_a_large_tensor_has_its_own_shard(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(1), "b": torch.zeros(100), "c": torch.zeros(1)}
    save_tensors(tmp_path / "part", tensors)
    written = assemble([tmp_path / "part"], tmp_path, 8)
    assert [sorted(load_file(path)) for path in written[:-1]] == [["a"], ["b"], ["c"]]


def test_rename(tmp_path: Path) -> None:
    save_tensors(tmp_path / "part", {"mlp.w": torch.ones(2)})
    written = assemble([tmp_path / "part"], tmp_path, 100, rename=lambda name: f"moe.{name}")
    assert list(load_file(written[0])) == ["moe.mlp.w"]


def test_a_name_in_two_parts_is_refused(tmp_path: Path) -> None:
    for part in ("x", "y"):
        save_tensors(tmp_path / part, {"w": torch.ones(1)})
    with pytest.raises(RotqError, match=r"w is both in .*x and in .*y"):
        assemble([tmp_path / "x", tmp_path / "y"], tmp_path, 100)


def test_a_truncated_part_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    save_tensors(tmp_path / "part", {"w": torch.ones(100)})
    os.truncate(tmp_path / "part", 300)
    with pytest.raises(RotqError, match="truncated"):
        assemble([tmp_path / "part"], tmp_path, 1000)
    assert list(tmp_path.glob("model*")) == []


def test_shard_size_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="positive"):
        assemble([], tmp_path, 0)


def test_dtype_that_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="complex64"):
        save_tensors(tmp_path / "x", {"w": torch.ones(1, dtype=torch.complex64)})


class FullDisk:
    """A file on a disk with room for ``room`` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_full(path: Path, mode: str, **kwargs: Any) -> Any:
        file = open(path, mode, **kwargs)  # noqa: SIM115
        return FullDisk(file, 500) if "x" in mode else file

    monkeypatch.setattr("rotq.disk.files.open", open_full, raising=False)


@pytest.mark.usefixtures("full_disk")
def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    save_tensors(target, {"w": torch.ones(10)})
    before = target.read_bytes()
    with pytest.raises(RotqError, match=r"cannot write .*No space left"):
        save_tensors(target, {"w": torch.ones(1000)})
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_full_disk_while_merging(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    save_tensors(tmp_path / "part", {"w": torch.ones(1000)})
    request.getfixturevalue("full_disk")
    with pytest.raises(RotqError, match="No space left"):
        assemble([tmp_path / "part"], tmp_path, 10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


@pytest.mark.usefixtures("full_disk")
def test_full_disk_while_writing_text(tmp_path: Path) -> None:
    with pytest.raises(RotqError, match="No space left"):
        write_text(tmp_path / "config.json", "x" * 501)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RotqError, match=r"cannot write .*No such file"):
        save_tensors(tmp_path / "none" / "x", {"w": torch.ones(1)})


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "x", {"w": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []
