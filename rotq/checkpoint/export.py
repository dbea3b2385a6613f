"""What a quantized checkpoint holds: packed tensors by name, config, recipe, tokenizer, card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotq.checkpoint.card import model_card
from rotq.checkpoint.files import read_json, write_json, write_text
from rotq.checkpoint.scheme_writing import quantization_config
from rotq.disk.files import whole_file
from rotq.errors import RotqError
from rotq.formats.exl3 import TiledWeight
from rotq.layers.quant_linear import QuantLinear
from rotq.layers.tiled_linear import TiledLinear
from rotq.recipe import write_yaml

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rotq.checkpoint.source import Source
    from rotq.formats.integer import Grid, Quantized

__all__ = ["packed_tensors", "quantization_config", "stored_scale_dtype", "write_metadata"]


def packed_layer(
    quantized: Quantized | TiledWeight, signs_R: Tensor | None = None
) -> QuantLinear | TiledLinear:
    """The layer that holds a weight as a checkpoint does; ``signs_R`` as below."""
    if isinstance(quantized, TiledWeight):
        return TiledLinear.from_tiled(quantized)
    return QuantLinear.from_quantized(quantized, signs_R=signs_R)


def packed_tensors(
    name: str, quantized: Quantized | TiledWeight, signs_R: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors a checkpoint holds for one layer, as compressed-tensors or EXL3 name them.

    Args:
        name: Full name of the layer.
        quantized: N out features, K in features, G groups. R of the K are rotated together.
        signs_R: Signs of the online rotation before the layer; only the rotq format has them.

    Returns:
        ``.weight_packed`` int32 (N, ceil(K * bits / 32)), ``.weight_scale`` (N, G) as stored,
        ``.weight_shape`` int64 [N, K]; on asymmetric grids ``.weight_zero_point`` int32
        (ceil(N * bits / 32), G); with signs ``.input_signs`` int8 (R). Of a weight in tiles
        ``.trellis``, ``.suh``, ``.svh`` and ``.mul1``.
    """
    layer = packed_layer(quantized, signs_R)
    return {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}


def stored_scale_dtype(
    wanted: torch.dtype,
    model_dtype: torch.dtype,
    grid: Grid,
    format: str,
    *,
    has_experts: bool = False,
) -> torch.dtype:
    """The dtype that scales must have been rounded to before codes are chosen.

    rotq multiplies in fp32 by the scale as stored. transformers casts scales to the model's dtype
    and multiplies in it; where it makes weights dense while loading (asymmetric grids, see
    ``quantization_config``, and experts, which it fuses) it multiplies in the scale's own dtype.
    The weight comes back bit by bit as solved for where scales are stored in the model's dtype,
    or, in an fp32 model without experts and zero points, in any narrower one.
    """
    import torch

    if format == "exl3":
        return torch.float16
    any_is_exact = grid.symmetric and not has_experts and model_dtype == torch.float32
    return wanted if format == "rotq" or any_is_exact else model_dtype


def write_metadata(
    out_dir: Path,
    source: Source,
    *,
    quantization: dict[str, Any],
    recipe: Mapping[str, Any],
    provenance: Mapping[str, Any],
    dtype: torch.dtype,
    untied: bool,
    obstacle: str | None = None,
) -> None:
    """Write everything that is not weights, and copy what the source has of it.

    Args:
        out_dir: Exists.
        quantization: From ``quantization_config``.
        recipe: The resolved recipe, for rotq_recipe.yaml.
        provenance: What else is needed to repeat the job, for rotq_provenance.json.
        dtype: Of the tensors left dense, and of activations.
        untied: The head has a tensor of its own that the source did not have.
        obstacle: Why transformers alone cannot load it (``loading_obstacle``), for the card.

    Raises:
        RotqError: a file cannot be read or written.
    """
    from rotq.models.task import auto_class

    config = read_json(source.path / "config.json")
    write_json(out_dir / "config.json", _updated(config, quantization, dtype, untied))
    write_text(out_dir / "rotq_recipe.yaml", write_yaml(recipe))
    write_json(out_dir / "rotq_provenance.json", dict(provenance))
    auto = auto_class(source.config).__name__
    card = model_card(config, quantization, source.hub, auto=auto, obstacle=obstacle)
    write_text(out_dir / "README.md", card)
    for path in {*source.tokenizer_files(), source.path / "generation_config.json"}:
        if path.is_file():
            _copy(path, out_dir / path.relative_to(source.path))


def _updated(
    config: dict[str, Any], quantization: dict[str, Any], dtype: torch.dtype, untied: bool
) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        if part is config or "dtype" in part or "torch_dtype" in part:
            part.pop("torch_dtype", None)
            part["dtype"] = name
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    return {**config, "quantization_config": quantization}


def _copy(path: Path, to: Path) -> None:
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
    except OSError as error:
        raise RotqError(f"cannot copy {path} to {to}: {error.strerror or error}") from error
    with whole_file(to) as file:
        file.write(content)
