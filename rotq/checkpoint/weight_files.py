"""Which files hold a checkpoint's weights: the same ones for every command, as transformers reads.

    config.json "transformers_weights"     a file or an index that it names
    model.safetensors                      else this one, also where there is an index
    model.safetensors.index.json           else the shards that it names

Files lie inside the checkpoint's folder. A file may be a link, as in the hub's cache; a folder on
the way to it may not lead elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path, PurePosixPath, PureWindowsPath

from rotq.checkpoint.files import read_json
from rotq.checkpoint.safetensors import Entry, read_entries
from rotq.errors import RotqError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def find_entries(path: Path) -> list[Entry]:
    """Every tensor of a checkpoint folder, file after file; a name occurs once.

    Raises:
        RotqError: no safetensors weights; a file that is named is missing, damaged, outside the
            folder, or lacks a tensor.
    """
    name = leading_name(path, {file.name for file in path.iterdir() if file.is_file()})
    if name is None:
        raise RotqError(f"{path} has no {SINGLE_NAME} and no {INDEX_NAME}{_other(path)}")
    if not (path / name).is_file():
        raise RotqError(f"{path} lacks {name}, which transformers_weights of config.json names")
    return _indexed(path, path / name) if _is_index(name) else read_entries(path / name)


def leading_name(path: Path, names: Collection[str]) -> str | None:
    """The file of a checkpoint's weights, or the index of their files; None where it has neither.

    Args:
        path: The folder; its config.json is read.
        names: Of the files that it has or can be given.

    Raises:
        RotqError: config.json names no safetensors, or a file outside of the folder.
    """
    # what config.json says explicitly transformers follows before it looks for names
    declared = _declared(path)
    if declared is not None:
        return declared
    return next((name for name in (SINGLE_NAME, INDEX_NAME) if name in names), None)


def shard_names(index: Path) -> list[str]:
    """The files that an index names, sorted.

    Raises:
        RotqError: it is no index, or names a file outside of its folder.
    """
    names = sorted(set(_weight_map(index).values()))
    for name in names:
        _inside(index.parent, name, index)
    return names


def pickled_name(names: Collection[str]) -> str | None:
    """As ``leading_name``, of pickled weights."""
    known = ("pytorch_model.bin", "pytorch_model.bin.index.json")
    return next((name for name in known if name in names), None)


def _is_index(name: str) -> bool:
    return name.endswith(".index.json")


def _declared(path: Path) -> str | None:
    config = path / "config.json"
    name = read_json(config).get("transformers_weights") if config.is_file() else None
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise RotqError(f"{config}: transformers_weights {name!r} is no safetensors file or index")
    _inside(path, name, config)
    return name


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RotqError(f"{index} has no weight_map")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise RotqError(f"{index}: the place of {name} is {file_name!r}, which is no file name")
    return weight_map


def _indexed(path: Path, index: Path) -> list[Entry]:
    weight_map = _weight_map(index)
    entries: dict[str, Entry] = {}
    for file_name in sorted(set(weight_map.values())):
        file = _inside(path, file_name, index)
        if not file.is_file():
            raise RotqError(f"{path} lacks the shard {file_name}, which its index names")
        entries.update({entry.name: entry for entry in read_entries(file)})
    for name, file_name in weight_map.items():
        if name not in entries:
            raise RotqError(f"{path / file_name} lacks the tensor {name}, which the index names")
    return list(entries.values())


def _inside(path: Path, name: str, says: Path) -> Path:
    """The file of that name in the folder.

    Raises:
        RotqError: it lies elsewhere: an absolute name, ``..``, or a folder that is a link.
    """
    parts = PurePosixPath(name)
    absolute = parts.is_absolute() or PureWindowsPath(name).is_absolute() or "\0" in name
    file = path / name if not absolute else path
    if absolute or ".." in parts.parts or not file.parent.resolve().is_relative_to(path.resolve()):
        raise RotqError(f"{says} names {name!r}, which is not inside {path}; nothing of it is read")
    return file


def _other(path: Path) -> str:
    pickled = sorted([*path.glob("pytorch_model*.bin"), *path.glob("*.pth")])
    if pickled:
        return f"; {pickled[0].name} must be converted to safetensors first"
    named = sorted(path.glob("*.safetensors"))
    return f"; it has {named[0].name}, which transformers does not look for" if named else ""
