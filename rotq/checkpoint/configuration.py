"""The configuration of a checkpoint, and the dtype that it declares or that its tensors have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotq.checkpoint.files import read_json
from rotq.checkpoint.foreign import library_errors
from rotq.checkpoint.safetensors import Entry
from rotq.errors import RotqError
from rotq.models.sizes import check_counts

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

FLOATS = ("F64", "F32", "F16", "BF16")
"""As safetensors spells the dtypes that a dense model may have."""

NAMES = ("float64", "float32", "float16", "bfloat16")
"""As config.json spells them."""

KEYS = ("dtype", "torch_dtype")
"""Where config.json has one; the first wins."""


def load_config(
    path: Path, *, trust_remote_code: bool = False, gguf_file: str | None = None
) -> PretrainedConfig:
    """The transformers config of a folder, or of a .gguf file in it.

    Raises:
        RotqError: transformers does not know the model type, or cannot read the config.
    """
    from transformers import AutoConfig

    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else unusable_dtype(path)
    if (path / "config.json").is_file():
        check_counts(read_json(path / "config.json"), path / "config.json")
    with library_errors(path / (gguf_file or "config.json")):
        return AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True, **options
        )


def checkpoint_dtype(config: Any, entries: Iterable[Entry], path: Path) -> torch.dtype:
    """What ``auto`` means for a checkpoint, as transformers reads it.

    The configuration decides, of a model in parts the whole one's before the text model's. Where
    it has none, or says "auto", the first floating-point tensor of the first file does.

    Args:
        config: transformers' configuration, from ``load_config``.
        entries: In any order; without any the answer is fp32.
        path: Of the checkpoint's folder.

    Raises:
        RotqError: config.json names a dtype that is none of a dense model.
    """
    import torch

    for part in (config, config.get_text_config()):
        if part.dtype is not None:
            return getattr(torch, part.dtype) if isinstance(part.dtype, str) else part.dtype
    if declares_dtype(path):
        raise RotqError(
            f"{path / 'config.json'}: dtype {_declared(path)!r} is no dtype of a dense model; "
            "pass --dtype, or correct it"
        )
    return _stored_dtype(entries)


def declares_dtype(path: Path) -> bool:
    """Whether config.json has a dtype of the whole model, right or wrong."""
    return _declared(path) not in (None, "auto")


def declared_dtype(path: Path) -> torch.dtype | None:
    """Of the whole model by config.json; None where it says none, or none that there is."""
    import torch

    declared = _declared(path)
    return getattr(torch, declared) if declared in NAMES else None


def unusable_dtype(path: Path) -> dict[str, None]:
    """What to pass on to transformers where config.json has a dtype that it stumbles over.

    "auto" and names that torch does not know would end its reading of the configuration, also
    where another dtype is asked for.
    """
    declared = _declared(path)
    if declared is None or declared in NAMES:
        return {}
    return dict.fromkeys(key for key in KEYS if key in read_json(path / "config.json"))


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }[name]


def _declared(path: Path) -> Any:
    """What config.json says, whatever it is; None where it says nothing."""
    file = path / "config.json"
    config = read_json(file) if file.is_file() else {}
    return next((config[key] for key in KEYS if config.get(key) is not None), None)


def _stored_dtype(entries: Iterable[Entry]) -> torch.dtype:
    floats = [entry for entry in entries if entry.dtype in FLOATS]
    first = min(floats, key=lambda entry: (entry.file, entry.name), default=None)
    return torch_dtype("F32" if first is None else first.dtype)
