"""GGUF files: converted once, by transformers in a process of its own, to dense safetensors.

``python -m rotq.checkpoint.gguf FILE.gguf FOLDER`` is that process. The model is dequantized to
fp32 in its memory, and the caller's memory stays small.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from rotq.checkpoint.child import run_module
from rotq.checkpoint.files import read_json, write_json
from rotq.disk.destination import check_apart, check_replaceable, exists
from rotq.disk.files import make_folder, remove, rename, sha256_of
from rotq.errors import RotqError

STAMP = "rotq_gguf.json"

_REMEMBERED = ("GGUFReader", "get_tensor_name_map")
"""Of the package ``gguf``: their results depend on nothing but arguments, and are only read."""


def find_gguf(path: Path) -> Path | None:
    """The .gguf file that ``path`` is or holds; None for a folder with a config.json.

    Raises:
        RotqError: ``path`` is another kind of file, or a folder with several .gguf files.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise RotqError(f"{path} is a file; a checkpoint is a folder or a .gguf file")
        return path
    if (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise RotqError(f"{path} holds {len(files)} .gguf files; name the one to read")
    return files[0] if files else None


def convert(gguf: Path, folder: Path) -> Path:
    """Convert ``gguf`` to a dense fp32 checkpoint in ``folder``, unless that was done before.

    The stamp in the folder is rotq's mark, made first; it has the checksums of all files once the
    conversion is complete. A conversion that is damaged is made anew.

    Returns:
        ``folder``.

    Raises:
        RotqError: the file cannot be converted, or ``folder`` holds what no conversion has made;
            ``folder`` is left as it was.
    """
    digest = sha256_of(gguf)
    if _is_conversion(folder, digest):
        return folder
    partial = folder.with_name(folder.name + ".partial")
    for path in (folder, partial):
        check_apart(path, {"the GGUF file": gguf}, named=path)
        if exists(path):
            check_replaceable(path, foreign_to_conversion, named=path)
    remove(partial)
    make_folder(partial)
    try:
        write_json(partial / STAMP, {"file": gguf.name})
        run_module("rotq.checkpoint.gguf", [gguf, partial], doing=f"converting {gguf.name}")
        made = sorted(file for file in partial.iterdir() if file.name != STAMP)
        files = {file.name: sha256_of(file) for file in made}
        write_json(partial / STAMP, {"file": gguf.name, "sha256": digest, "files": files})
        remove(folder)
        rename(partial, folder)
    finally:
        remove(partial)
    return folder


def foreign_to_conversion(folder: Path) -> str | None:
    """What no conversion has made of an existing path, in words; None for one, or an empty folder.

    What is still in the making holds whatever transformers writes.
    """
    if folder.is_symlink() or not folder.is_dir():
        return "is no folder"
    entries = sorted(folder.iterdir())
    if not entries:
        return None
    stamp = folder / STAMP
    if stamp.is_symlink() or not stamp.is_file():
        return f"holds {entries[0].name} and is no conversion of rotq's"
    made = read_json(stamp).get("files")
    for entry in entries:
        known = not isinstance(made, dict) or entry.name in (STAMP, *made)
        if entry.is_symlink() or not entry.is_file() or not known:
            return f"holds {entry.name}, which rotq did not make"
    return None


def _is_conversion(folder: Path, digest: str) -> bool:
    """Whether a folder holds all of a conversion, as it was written."""
    if not (folder / STAMP).is_file():
        return False
    stamp = read_json(folder / STAMP)
    files = stamp.get("files")
    return (
        stamp.get("sha256") == digest
        and isinstance(files, dict)
        and all((folder / name).is_file() for name in files)
        and all(sha256_of(folder / name) == sha256 for name, sha256 in files.items())
    )


@contextmanager
def read_once(*models: Path) -> Iterator[None]:
    """Inside, what transformers has parsed of a GGUF file is remembered, until the outermost end.

    It parses a file's metadata, with each token of its vocabulary, anew for the configuration, the
    tokenizer and the weights, and makes the table of tensor names anew for each module: seconds
    each, most of what a small model takes to load.

    Args:
        models: What will be read; nothing is remembered where none of them is a GGUF file.

    Raises:
        RotqError: see ``find_gguf``.
    """
    if importlib.util.find_spec("gguf") is None or not any(map(find_gguf, models)):
        yield
        return
    import gguf

    outside = {name: getattr(gguf, name) for name in _REMEMBERED}
    for name, made in outside.items():
        setattr(gguf, name, made if hasattr(made, "cache_clear") else lru_cache(made))
    try:
        yield
    finally:
        for name, made in outside.items():
            setattr(gguf, name, made)


def load_gguf(gguf: Path, *, dtype: Any, device_map: Any = None) -> Any:
    """The model in a .gguf file, dense, without a trace of the file's quantization.

    transformers needs the package ``gguf`` for this.
    """
    from transformers import AutoModelForCausalLM

    with read_once(gguf):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=dtype,
            device_map=device_map,
            local_files_only=True,
        )
    # transformers leaves the GGUF config in place of the dense model it has made, and a model
    # saved with it is taken for a GGUF file again
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model


def main(arguments: list[str]) -> None:
    """Convert one GGUF file, ``arguments[0]``, to a dense checkpoint in ``arguments[1]``."""
    import torch
    from transformers import AutoTokenizer

    gguf, folder = Path(arguments[0]).absolute(), Path(arguments[1])
    with read_once(gguf):
        model = load_gguf(gguf, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
