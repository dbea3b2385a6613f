"""LoRA by PEFT on layers that are packed, or that change their input at run time.

    y = p(x) W^T + b + scaling * dropout(x) A^T B^T        A and B are trained, W is as it was

PEFT has no registry of layers; what ``LoraConfig._register_custom_module`` takes is not saved with
an adapter, nor meant by "all-linear". So functions of PEFT are extended, when it is imported
(``checkpoint.registration``): which module adapts a layer, what "all-linear" means, and which
models have their experts in one tensor, so that what is said of experts is converted. Ours are
modules, as they were before transformers 5. Whatever is not rotq's goes on to what was there.

Merging is refused: B A has no codes, and where p is no identity it has no place in W either.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, NoReturn

from peft.tuners import tuners_utils
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils import transformers_weight_conversion as conversion
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from rotq.checkpoint.names import NameTable
from rotq.errors import RotqError
from rotq.layers.online_linear import OnlineLinear
from rotq.layers.quant_linear import QuantLinear
from rotq.models.experts import UnfusedExperts

OURS = (QuantLinear, OnlineLinear)

KEEPS_WEIGHTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that write A and B only."""


class RotqLoraLinear(Linear):
    """An adapter on a layer of ``OURS``."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **options: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config, **options)
        # of Conv1D, which packed layers have replaced
        self.fan_in_fan_out = False

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone; the others change or measure the weight below."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, **options: Any) -> None:
        """Add or replace an adapter.

        Raises:
            RotqError: its initialization would change the layer below.
        """
        start = options["config"].init_lora_weights
        if start not in KEEPS_WEIGHTS:
            raise RotqError(
                f"init_lora_weights={start!r} changes the weight that the adapter is put on, and a "
                f"packed one stays as it is; choose one of {', '.join(map(repr, KEEPS_WEIGHTS))}"
            )
        super().update_layer(adapter_name, r, **options)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse.

        Raises:
            RotqError: always; says what can be done instead.
        """
        layer = self.get_base_layer()
        if layer.input_signs is not None or layer.input_grid is not None:
            raise RotqError(
                "an adapter cannot be merged into a layer that rotates or rounds its input: keep "
                "it beside the model"
            )
        raise RotqError(
            "an adapter cannot be merged into packed weights: keep it beside the model, or put it "
            "on the dense one of rotq.load(PATH, packed=False) and merge it there"
        )

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Without PEFT's warning that it does not know the class."""
        return module.in_features, module.out_features  # type: ignore[return-value]


def _dispatching(create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @wraps(create)
    def create_new_module(
        lora_config: LoraConfig, adapter_name: str, target: nn.Module, **options: Any
    ) -> nn.Module:
        layer = target.get_base_layer() if isinstance(target, LoraLayer) else target
        if isinstance(layer, OURS):
            return RotqLoraLinear(target, adapter_name, config=lora_config, **options)
        return create(lora_config, adapter_name, target, **options)

    return create_new_module


def _including(include: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(include)
    def include_all_linear(config: Any, model: nn.Module) -> Any:
        wanted = getattr(config, "target_modules", None)
        config = include(config, model)
        if isinstance(wanted, str) and wanted.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            config.target_modules = {*config.target_modules, *_packed_layers(model)}
        return config

    return include_all_linear


def _packed_layers(model: Any) -> list[str]:
    """Names of those without an adapter; the head is left out, as PEFT leaves it out."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLinear) and layer is not head and not name.endswith(".base_layer")
    ]


def _has_unfused(model: nn.Module) -> bool:
    return any(isinstance(part, UnfusedExperts) for part in model.modules())


def _unless_unfused(
    convert: Callable[..., Any], otherwise: str | None = None
) -> Callable[..., Any]:
    """Leave the parameter ``otherwise`` as it is where experts are modules."""
    names = signature(convert)

    @wraps(convert)
    def convert_unless_unfused(*args: Any, **options: Any) -> Any:
        given = names.bind(*args, **options).arguments
        if _has_unfused(given["model"]):
            return None if otherwise is None else given[otherwise]
        return convert(*args, **options)

    return convert_unless_unfused


def _without_rules(load: Callable[..., Any]) -> Callable[..., Any]:
    """Load an adapter of unfused experts without transformers' rules for fusing them."""

    @wraps(load)
    def load_adapter(model: nn.Module, *args: Any, **options: Any) -> Any:
        if "load_config" not in options and _has_unfused(model):
            # an empty list would be none, for which transformers takes its rules
            options.setdefault("weight_mapping", [NameTable({})])
        return load(model, *args, **options)

    return load_adapter


LoraModel._create_new_module = staticmethod(_dispatching(LoraModel._create_new_module))
tuners_utils._maybe_include_all_linear_layers = _including(
    tuners_utils._maybe_include_all_linear_layers
)
conversion.convert_peft_config_for_transformers = _unless_unfused(
    conversion.convert_peft_config_for_transformers
)
conversion.convert_peft_adapter_state_dict_for_transformers = _unless_unfused(
    conversion.convert_peft_adapter_state_dict_for_transformers, "adapter_state_dict"
)
PeftAdapterMixin.load_adapter = _without_rules(PeftAdapterMixin.load_adapter)
