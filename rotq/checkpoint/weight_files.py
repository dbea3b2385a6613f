"""Which files hold a checkpoint's weights: the same ones for every command, as transformers reads.

    config.json "transformers_weights"     a file or an index that it names
    model.safetensors                      else this one, also where there is an index
    model.safetensors.index.json           else the shards that it names

Files lie inside the checkpoint's folder. A file may be a link, as in the hub's cache; a folder on
the way to it may not lead elsewhere.
"""

from __future__ import annotations

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
    named = _named(path)
    if named is None:
        single, index = path / SINGLE_NAME, path / INDEX_NAME
        if not single.is_file() and not index.is_file():
            raise RotqError(f"{path} has no {SINGLE_NAME} and no {INDEX_NAME}{_other(path)}")
        named = single if single.is_file() else index
    if not named.name.endswith(".index.json"):
        return read_entries(named)
    return _indexed(path, named)


def _named(path: Path) -> Path | None:
    """What config.json says explicitly; transformers follows it before it looks for names."""
    config = path / "config.json"
    name = read_json(config).get("transformers_weights") if config.is_file() else None
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise RotqError(f"{config}: transformers_weights {name!r} is no safetensors file or index")
    file = _inside(path, name, config)
    if not file.is_file():
        raise RotqError(f"{path} lacks {name}, which transformers_weights of config.json names")
    return file


def _indexed(path: Path, index: Path) -> list[Entry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RotqError(f"{index} has no weight_map")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise RotqError(f"{index}: the place of {name} is {file_name!r}, which is no file name")
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
