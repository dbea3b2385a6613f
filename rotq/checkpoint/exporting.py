"""Quantized checkpoints in the files of other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rotq.checkpoint.files import read_json
from rotq.checkpoint.load import load_model
from rotq.checkpoint.location import locate
from rotq.checkpoint.scheme import Scheme, read_scheme
from rotq.errors import RotqError
from rotq.layers.online_heads import UNTOUCHED


def export_checkpoint(
    checkpoint: str, folder: Path, kind: str, type_: str, *, name: str
) -> dict[str, Any]:
    """Write a checkpoint's export into an existing, empty folder.

    Args:
        checkpoint: As for ``load_model``.
        kind: "gguf" or "gptq".
        type_: Of GGUF's packed tensors, or "auto".
        name: Of the file.

    Returns:
        What was written, in plain values.

    Raises:
        RotqError: it is not quantized, does something at run time, or the format has no place for
            its family or its codes.
        ValueError: ``type_`` is for gguf.
    """
    if kind != "gguf" and type_ != "auto":
        raise ValueError("--type is for --format gguf")
    found = locate(checkpoint)
    declared = read_json(found.path / "config.json").get("quantization_config")
    if not declared:
        raise RotqError(f"{checkpoint} is not quantized; rotq export writes codes")
    if declared.get("quant_method") == "exl3":
        raise RotqError(f"{checkpoint} is in EXL3, whose codes no other format holds")
    _check_at_rest(checkpoint, read_scheme(declared))
    model = load_model(checkpoint)
    if kind == "gguf":
        from rotq.checkpoint.gguf_writing import write_gguf

        file = folder / f"{name}.gguf"
        written = write_gguf(model, found.path, file, type_)
        return {
            "file": file.name,
            "bytes": file.stat().st_size,
            "types": written.types,
            "largest_change": written.largest_change,
        }
    from rotq.checkpoint.gptq_writing import write_gptq

    return write_gptq(model, found.path, folder)


def _check_at_rest(checkpoint: str, scheme: Scheme) -> None:
    """Other engines' files have no words for what happens at run time."""
    for happens, setting in (
        (bool(scheme.rotated), "rotation.down=none and rotation.inputs=none"),
        (scheme.turns_residual, "rotation.residual_ends=fused"),
        (scheme.heads.rotated, "rotation.attention=none"),
        (scheme.heads != UNTOUCHED, "kv_cache.bits=16"),
        (any(group.input_grid for group in scheme.groups), "activations.bits=16"),
    ):
        if happens:
            raise RotqError(
                f"{checkpoint} changes activations at run time, which the file has no words for; "
                f"quantize with {setting}"
            )
