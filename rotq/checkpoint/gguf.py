"""GGUF files: converted once, by transformers in a process of its own, to dense safetensors.

``python -m rotq.checkpoint.gguf FILE.gguf FOLDER`` is that process. The model is dequantized to
fp32 in its memory, and the caller's memory stays small.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

from rotq.checkpoint.child import run_module
from rotq.checkpoint.files import read_json, write_json
from rotq.errors import RotqError

STAMP = "rotq_gguf.json"


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

    Returns:
        ``folder``.

    Raises:
        RotqError: the file cannot be converted; ``folder`` is left as it was.
    """
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    stamp = folder / STAMP
    if stamp.is_file() and read_json(stamp).get("sha256") == digest:
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        run_module("rotq.checkpoint.gguf", [gguf, partial], doing=f"converting {gguf.name}")
        write_json(partial / STAMP, {"file": gguf.name, "sha256": digest})
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def load_gguf(gguf: Path, *, dtype: Any, device_map: Any = None) -> Any:
    """The model in a .gguf file, dense, without a trace of the file's quantization.

    transformers needs the package ``gguf`` for this.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=dtype, device_map=device_map, local_files_only=True
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
    model = load_gguf(gguf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
