"""What a checkpoint's recipe did to the hidden states, so that it can be taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotq.checkpoint.files import read_json
from rotq.errors import RotqError
from rotq.evaluation.representations import OriginalBasis
from rotq.fusion.draw import build_basis
from rotq.models.registry import adapter_for
from rotq.recipe import Rotation, load_bases

RECIPE = "rotq_recipe.yaml"


def is_rotated(checkpoint: Path) -> bool:
    """Whether what its final norm gives is in another basis than its original's.

    Raises:
        RotqError: its recipe cannot be read, or that basis was trained: it stands nowhere.
    """
    return _rotation(checkpoint) is not None and not _turns_at_run_time(checkpoint)


def basis_of(checkpoint: Path, model: Any, reference: Any) -> OriginalBasis | None:
    """Of the last hidden states, behind the final norm; None where the recipe left them alone.

    Args:
        checkpoint: Folder of ``model``.
        model: A language model of transformers.
        reference: The original, which has the gain of the final norm.

    Raises:
        RotqError: as ``is_rotated``.
    """
    rotation = _rotation(checkpoint)
    if rotation is None or _turns_at_run_time(checkpoint):
        return None
    R_DD = _residual(rotation, model)
    path = adapter_for(model).final_norm
    norm, own = reference.get_submodule(path), model.get_submodule(path)
    bias_D, kept_D = getattr(norm, "bias", None), getattr(own, "bias", None)
    # where no reader could take the norm's bias, it is in what the norm gives, and turns with it
    inside = kept_D is not None and bool(kept_D.any())
    return OriginalBasis(R_DD=R_DD, gain_D=norm.weight, added_D=None if inside else bias_D)


def inner_basis_of(checkpoint: Path, model: Any, layer: int) -> OriginalBasis | None:
    """Of hidden states in front of the final norm, whose gain is not in them; as ``basis_of``.

    Args:
        layer: 0 for what the first block is given, and so on; may count from the end.
    """
    rotation = _rotation(checkpoint)
    blocks = model.config.get_text_config().num_hidden_layers
    # transformers records what blocks are given, the first one's once it is turned
    is_turned = layer % (blocks + 1) < blocks
    if rotation is None or (_turns_at_run_time(checkpoint) and not is_turned):
        return None
    R_DD = _residual(rotation, model)
    return OriginalBasis(R_DD=R_DD, gain_D=torch.ones(len(R_DD)), added_D=None)


def _residual(rotation: Rotation, model: Any) -> Tensor:
    R_DD = build_basis(rotation, adapter_for(model), model.config).residual_DD
    assert R_DD is not None, "the recipe has a rotation of the residual stream"
    return R_DD


def _turns_at_run_time(checkpoint: Path) -> bool:
    """Whether its first block turns the residual stream, and its last one turns it back."""
    declared = read_json(checkpoint / "config.json").get("quantization_config") or {}
    return "residual" in (declared.get("online") or {})


def _rotation(checkpoint: Path) -> Rotation | None:
    """None where the residual stream is as it was."""
    file = checkpoint / RECIPE
    if not file.is_file():
        return None
    try:
        rotation, transform = load_bases(file)
    except ValueError as error:
        raise RotqError(str(error)) from None
    if rotation.residual == "none":
        return None
    if transform.method != "fixed":
        raise RotqError(
            f"{checkpoint}: its rotation of the residual stream was trained "
            f"(transform.method={transform.method}) and is not kept: hidden states cannot be led "
            "back to the original basis"
        )
    return rotation
