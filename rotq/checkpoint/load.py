"""Loading models and tokenizers from local folders: dense, GGUF, rotq and compressed-tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotq.checkpoint.files import read_json
from rotq.checkpoint.gguf import find_gguf, load_gguf
from rotq.checkpoint.scheme import ROTQ_VERSION, read_scheme
from rotq.checkpoint.source import load_config
from rotq.devices import usable_device
from rotq.errors import RotqError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""What accelerate takes besides the name of a device."""


def load_model(
    path: Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    packed: bool = True,
) -> PreTrainedModel:
    """Load a language model with its head, causal or masked, in eval mode.

    Args:
        path: Folder of a dense, rotq or compressed-tensors (``pack-quantized``) checkpoint, a
            folder that holds one .gguf file, or that file. compressed-tensors checkpoints need
            no other package.
        dtype: Of dense weights and activations; ``auto`` takes the config's, fp32 for GGUF.
        device_map: As for ``from_pretrained``.
        trust_remote_code: Let transformers run the checkpoint's own code.
        packed: Keep quantized weights packed; else they are made dense, with equal results.

    Raises:
        RotqError: the checkpoint is missing, corrupt, incomplete, or of a kind that rotq does not
            read; or this machine has no such device.
    """
    import torch

    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        usable_device(device_map, "--device-map")
    if not path.exists():
        raise RotqError(f"{path} does not exist; rotq reads local folders only")
    gguf = find_gguf(path)
    if gguf is not None:
        return load_gguf(
            gguf, dtype=torch.float32 if dtype == "auto" else dtype, device_map=device_map
        )
    config = load_config(path, trust_remote_code=trust_remote_code)
    quantized = _as_rotq(path, config)
    model = _from_pretrained(
        path,
        strict=quantized,
        config=config,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    if quantized and not packed:
        model = model.dequantize(model.dtype)
    return model.eval()


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or a .gguf file.

    Raises:
        RotqError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    if not path.exists():
        raise RotqError(f"{path} does not exist; rotq reads local folders only")
    gguf = find_gguf(path)
    options = {"gguf_file": gguf.name} if gguf else {}
    folder = gguf.parent if gguf else path
    try:
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise RotqError(f"{path}: no usable tokenizer: {_first_line(error)}") from error


def _as_rotq(path: Path, config: Any) -> bool:
    """Direct a quantized checkpoint to our quantizer; False for a dense one."""
    declared = read_json(path / "config.json").get("quantization_config")
    if not declared:
        return False
    try:
        read_scheme(declared)
    except RotqError as error:
        raise RotqError(f"{path}: {error}") from error
    from rotq.checkpoint.quantizer import register

    register()
    kept = ("config_groups", "ignore", "format", "online", "attention")
    config.quantization_config = {
        "quant_method": "rotq",
        "version": ROTQ_VERSION,
        **{key: declared[key] for key in kept if key in declared},
    }
    return True


def _from_pretrained(path: Path, *, strict: bool, **options: Any) -> PreTrainedModel:
    import transformers
    from safetensors import SafetensorError

    from rotq.models.task import auto_class

    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = auto_class(options["config"]).from_pretrained(
            path, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RotqError(f"cannot load {path}: {_first_line(error)}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    # transformers fills what is missing with random numbers
    for kind in ("missing_keys", "mismatched_keys", *(["unexpected_keys"] if strict else [])):
        if info.get(kind):
            first = sorted(map(str, info[kind]))[0]
            number = len(info[kind])
            raise RotqError(f"cannot load {path}: {number} {kind.replace('_', ' ')}, first {first}")
    return model


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
