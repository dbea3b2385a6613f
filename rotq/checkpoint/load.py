"""Loading models and tokenizers, from here or the hub: dense, GGUF, rotq, compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotq.checkpoint.configuration import checkpoint_dtype, load_config, unusable_dtype
from rotq.checkpoint.files import read_json
from rotq.checkpoint.foreign import library_errors
from rotq.checkpoint.gguf import find_gguf, load_gguf
from rotq.checkpoint.location import ModelName, locate
from rotq.checkpoint.scheme import ROTQ_VERSION, read_scheme
from rotq.checkpoint.weight_files import find_entries
from rotq.devices import fast_dtype, usable_device
from rotq.errors import RotqError
from rotq.memory import physical_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rotq.checkpoint.safetensors import Entry

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""What accelerate takes besides the name of a device."""


def load_model(
    model: ModelName,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    packed: bool = True,
    auto: Any = None,
    **settings: Any,
) -> PreTrainedModel:
    """Load a model in eval mode.

    Args:
        model: Folder of a dense, rotq or compressed-tensors (``pack-quantized``) checkpoint, a
            folder that holds one .gguf file, or that file; or a hub id (see ``locate``).
            compressed-tensors checkpoints need no other package.
        dtype: Of dense weights and activations; ``auto`` takes the config's, fp32 for GGUF;
            ``fast`` does too, but fp32 for one that a CPU has no products in, where the weights
            take no more than half of the machine's memory so.
        device_map: As for ``from_pretrained``.
        trust_remote_code: Let transformers run the checkpoint's own code.
        packed: Keep quantized weights packed; else they are made dense, with equal results.
        auto: transformers' auto class, as ``AutoModel`` for embeddings. None is the language model,
            causal or masked, all of which must be in the checkpoint.
        settings: Of the configuration, as ``num_labels`` of a new head.

    Raises:
        ValueError: the configuration has no such setting, or a GGUF file is to have another head.
        RotqError: the checkpoint is missing, corrupt, incomplete, or of a kind that rotq does not
            read; or this machine has no such device.
    """
    import torch

    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        usable_device(device_map, "--device-map")
    found = locate(model)
    path, gguf = found.path, find_gguf(found.path)
    if gguf is not None:
        if auto is not None or settings:
            raise ValueError(
                "auto and settings are for folders; a GGUF file holds a language model"
            )
        with library_errors(gguf):
            return load_gguf(
                gguf,
                dtype=torch.float32 if dtype in ("auto", "fast") else dtype,
                device_map=device_map,
            )
    config = load_config(path, trust_remote_code=trust_remote_code)
    for name, value in settings.items():
        if not hasattr(config, name):
            raise ValueError(f"the configuration of {config.model_type} has no {name}")
        setattr(config, name, value)
    quantized = _as_rotq(path, config)
    found.fetch_weights(pickled=True)
    # transformers would follow an index out of the folder, and says less about what is damaged
    entries = [] if _is_pickled(path) else find_entries(path)
    if dtype in ("auto", "fast"):
        stored = checkpoint_dtype(config, entries, path)
        dtype = _fast(stored, entries, device_map) if dtype == "fast" else stored
    loaded = _from_pretrained(
        path,
        auto,
        strict=quantized,
        config=config,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    if quantized and not packed and hasattr(loaded, "hf_quantizer"):
        loaded = loaded.dequantize(loaded.dtype)
    return loaded.eval()


def _fast(stored: torch.dtype, entries: Iterable[Entry], device_map: Any) -> torch.dtype:
    import torch

    in_fp32 = 2 * sum(entry.num_bytes for entry in entries)
    if device_map not in (None, "cpu") or in_fp32 > physical_memory() // 2:
        return stored
    return fast_dtype(stored, torch.device("cpu"))


def load_tokenizer(model: ModelName, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a .gguf file or a model of the hub.

    Raises:
        RotqError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    path = locate(model).path
    gguf = find_gguf(path)
    options: dict[str, Any] = {"gguf_file": gguf.name} if gguf else {}
    if not gguf and unusable_dtype(path):
        options["config"] = load_config(path, trust_remote_code=trust_remote_code)
    folder = gguf.parent if gguf else path
    with library_errors(f"{path}: no usable tokenizer"):
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True, **options
        )


def _is_pickled(path: Path) -> bool:
    """Whether transformers finds pickled weights only."""
    found = [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]
    return not found and any(path.glob("pytorch_model*.bin"))


def _as_rotq(path: Path, config: Any) -> bool:
    """Direct a quantized checkpoint to our quantizer; False for a dense one."""
    declared = read_json(path / "config.json").get("quantization_config")
    if not declared:
        return False
    from rotq.checkpoint.quantizer import register

    register()
    if declared.get("quant_method") == "exl3":
        return True
    try:
        read_scheme(declared)
    except RotqError as error:
        raise RotqError(f"{path}: {error}") from error
    kept = ("config_groups", "ignore", "format", "online", "attention")
    config.quantization_config = {
        "quant_method": "rotq",
        "version": ROTQ_VERSION,
        "saved_as": declared,
        **{key: declared[key] for key in kept if key in declared},
    }
    return True


def _from_pretrained(path: Path, auto: Any, *, strict: bool, **options: Any) -> PreTrainedModel:
    from rotq.models.task import auto_class

    found = auto_class(options["config"]) if auto is None else auto
    # a tensor of another shape is told apart from other errors, and named, where it is ignored
    with library_errors(f"cannot load {path}"), _no_bars():
        model, info = found.from_pretrained(
            path,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    # transformers fills what is missing with random numbers
    kinds = ("missing_keys", "mismatched_keys", *(["unexpected_keys"] if strict else []))
    for kind in kinds:
        keys = set(info.get(kind) or ())
        if auto is not None:
            keys = _in_blocks(keys) if kind == "missing_keys" else keys
            keys = set() if kind == "unexpected_keys" else keys
        if keys:
            first, number = min(keys, key=str), f"{len(keys)} {kind.replace('_', ' ')}"
            raise RotqError(f"cannot load {path}: {number}, first {_described(first)}")
    return model


def _in_blocks(keys: set[str]) -> set[str]:
    """Those that no head has, whatever it is: a part of them is a block's number."""
    return {key for key in keys if any(part.isdecimal() for part in key.split("."))}


def _described(key: str | tuple[str, Any, Any]) -> str:
    """A tensor's name; of one that does not fit, both shapes too."""
    if isinstance(key, str):
        return key
    name, stored, wanted = key
    return f"{name}: the checkpoint has shape {list(stored)}, its configuration says {list(wanted)}"


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
