"""What keeps transformers, without rotq, from loading a checkpoint that rotq writes.

It is found out when the checkpoint is written, by trying on meta what transformers would do with
the files' names and with modules whose weights are packed. Read from transformers 5.23 with
compressed-tensors 0.20.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from rotq.checkpoint.scheme_writing import transformers_obstacle
from rotq.models.experts import StackedExperts
from rotq.models.skeleton import Skeleton


def loading_obstacle(
    skeleton: Skeleton,
    quantization: Mapping[str, Any],
    layers: Iterable[str],
    stored_name: Callable[[str], str],
) -> str | None:
    """Why transformers alone cannot load this checkpoint; None where it can.

    Args:
        quantization: From ``quantization_config``.
        layers: Full names of the quantized layers.
        stored_name: Of a tensor, in the files (``Source.stored_name``).
    """
    if quantization["quant_method"] in ("rotq", "exl3"):
        return None
    layers = list(layers)
    # Llama 4's experts transformers replaces by a list of its own, one by one, where it quantizes
    mixtures = [
        name
        for name in skeleton.conversion.mixtures
        if not isinstance(skeleton.model.get_submodule(name), StackedExperts)
    ]
    experts = [name for name in layers if any(name.startswith(f"{m}.") for m in mixtures)]
    obstacle = transformers_obstacle(quantization, has_experts=bool(experts))
    if obstacle is not None:
        return obstacle
    stored = [stored_name(f"{name}.weight") for name in experts]
    if not skeleton.conversion.merges(stored):
        return "it has the experts of this family in one tensor, and does not read them one by one"
    others = {name: stored_name(f"{name}.weight_packed") for name in set(layers) - set(experts)}
    for name in sorted(others):
        if not skeleton.conversion.keeps(others[name], f"{name}.weight_packed"):
            return f"it does not find {others[name]} again"
    # where it makes weights dense while loading, its modules have them when they are used
    return None if quantization.get("dequantize") else _module_obstacle(skeleton, others)


def _module_obstacle(skeleton: Skeleton, layers: Iterable[str]) -> str | None:
    """What looks at a weight that is packed."""
    read = next((name for name in layers if name in skeleton.read), None)
    if read is not None:
        return f"the model looks at {read}.weight, which is packed"
    wanted = set(layers)
    seen = set()
    for index, block in enumerate(skeleton.blocks):
        prefix = skeleton.block_name(index)
        packed = tuple(path for path, _ in block.named_modules() if f"{prefix}.{path}" in wanted)
        if (type(block), packed) in seen:
            continue
        seen.add((type(block), packed))
        path = _initialized(skeleton.model, block, packed)
        if path is not None:
            return f"it initializes the weight of {path} in every block, which is packed"
    return None


def _initialized(model: Any, block: nn.Module, packed: Iterable[str]) -> str | None:
    """The packed layer whose weight the model's initialization looks for; on meta."""
    bare = copy.deepcopy(block, {id(model.config): model.config})
    for path in packed:
        bare.set_submodule(path, _Packed())
    for module in bare.modules():
        try:
            model._init_weights(module)
        except _WeightWantedError as error:
            named = {id(part): path for path, part in bare.named_modules()}
            return named[id(error.module)]
    return None


class _WeightWantedError(Exception):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class _Packed(nn.Module):
    """A layer without a weight."""

    @property
    def weight(self) -> None:
        raise _WeightWantedError(self)
