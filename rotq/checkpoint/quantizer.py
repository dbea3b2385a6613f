"""The transformers side of the rotq format: packed linear layers put in before loading.

This module is imported while transformers is (see registration.py), so at its top it only takes
what is complete by then.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rotq.checkpoint import exl3_loading
from rotq.checkpoint.configuration import torch_dtype
from rotq.checkpoint.dense import make_dense
from rotq.checkpoint.packed_embedding import check_shapes, put_quant_embeddings
from rotq.checkpoint.safetensors import Entry, read_entries
from rotq.checkpoint.scheme import Scheme, read_scheme
from rotq.errors import RotqError
from rotq.formats.floats import is_plain, stored_as
from rotq.layers.online_heads import UNTOUCHED, OnlineHeads
from rotq.layers.online_residual import turn_ends
from rotq.layers.packed_weight import PackedWeight
from rotq.layers.quant_linear import QuantLinear

if TYPE_CHECKING:
    from rotq.checkpoint.names import Names
    from rotq.models.adapter import Adapter

METHOD = "rotq"


class RotqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a rotq checkpoint; the fields are explained in scheme.py.

    Args:
        saved_as: What ``save_pretrained`` writes instead: the tensors are those of another format,
            or of another version of this one, and are saved as they came.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        saved_as: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        self.quant_method, self.saved_as = quant_method, saved_as
        for name, value in fields.items():
            setattr(self, name, value)
        self.scheme()

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        fields = super().to_dict()
        saved_as = fields.pop("saved_as")
        return fields if saved_as is None else saved_as

    def scheme(self) -> Scheme:
        """The fields, read and checked."""
        return read_scheme(self.__dict__)


class RotqHfQuantizer(HfQuantizer):
    """Loads checkpoints whose linear layers are packed, and keeps them packed.

    Tensors load one to one, under the names of ``names.names_of``: experts are unfused before, and
    the conversions by which transformers fuses them are left out. Those of other tensors are not.
    """

    requires_calibration = True
    quantization_config: RotqConfig

    def __init__(self, quantization_config: RotqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.names: Names | None = None

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise RotqError("a rotq checkpoint is loaded from its safetensors files")
        from rotq.checkpoint.names import names_of
        from rotq.models.conversion import Conversion
        from rotq.models.experts import unfuse_experts
        from rotq.models.families.gpt2 import linearize
        from rotq.models.registry import known_renames

        conversion = Conversion(model)
        forms = unfuse_experts(model)
        for name in forms:
            # families initialize from there what the fused module had; all of it is loaded
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]
        linearize(model)
        stored = {entry.name: entry for entry in _entries(checkpoint_files)}
        self.names = names_of(stored, conversion.unfused(model, forms), known_renames(model.config))
        scheme = self.quantization_config.scheme()
        _name_plain(self.names.model, model, scheme)
        entries = {ours: stored[name] for name, ours in self.names.model.items()}
        put_quant_linears(model, scheme, entries)
        put_quant_embeddings(model, scheme, entries)
        put_online_heads(model, scheme.heads)
        if scheme.turns_residual:
            put_online_residual(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.restore_dtypes()
        model.num_parameters = functools.partial(num_parameters, model)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """A table in place of all rules, but for those that convert what lies beside the decoder.

        ``model`` is passed since transformers 5.23.
        """
        from rotq.checkpoint.names import NameTable

        assert self.names is not None, "the model was processed before"
        return [NameTable(self.names.model | self.names.ruled), *self.names.rules]

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters on the packed layers are; the codes themselves have no gradient."""
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        scheme = self.quantization_config.scheme()
        make_dense(model, scheme, dtype or model.dtype)  # type: ignore[arg-type]
        return model


def put_quant_linears(model: nn.Module, scheme: Scheme, entries: dict[str, Entry]) -> None:
    """Replace the linear layers that ``scheme`` names, on meta.

    Args:
        model: Modified.
        entries: The checkpoint's tensors by our name.

    Raises:
        RotqError: a layer has no packed tensors, or its shape is not that of the model.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    scheme.check_patterns([name for name, _ in linears])
    for name, linear in linears:
        group = scheme.group(name, prefix)
        if group is None or _is_new(name, scheme, prefix, entries):
            continue
        scale = entries.get(f"{name}.weight_scale")
        if scale is None or f"{name}.weight_packed" not in entries:
            raise RotqError(f"{name} is quantized, but the checkpoint has no packed weight for it")
        try:
            layer = QuantLinear(
                linear.in_features,
                linear.out_features,
                group.grid,
                bias=linear.bias is not None,
                rotation_size=scheme.rotation_size(name, linear.in_features, prefix),
                input_grid=group.input_grid,
                scale_dtype=stored_as(group.grid) or torch_dtype(scale.dtype),
                dtype=linear.weight.dtype,
                device="meta",
            )
        except ValueError as error:
            raise RotqError(f"{name}: {error}") from error
        check_shapes(name, layer, entries)
        model.set_submodule(name, layer)


def _name_plain(names: dict[str, str], model: nn.Module, scheme: Scheme) -> None:
    """Codes that files call ``weight`` under the name that packed layers have for theirs.

    Args:
        names: From a file's names to the model's; modified.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    plain = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_plain(scheme.grid(name, prefix))
    }
    names |= {stored: f"{ours}_packed" for stored, ours in names.items() if ours in plain}


def put_online_heads(model: Any, heads: OnlineHeads) -> None:
    """Let every attention of the model rotate and round its heads.

    Raises:
        RotqError: the family's attention is not known, or another one than sdpa is wanted.
    """
    from rotq.models.attention.online import set_heads, use_online_attention

    if heads == UNTOUCHED:
        return
    adapter, blocks = _blocks(model)
    use_online_attention(model)
    for block in blocks:
        set_heads(block.get_submodule(adapter.attention), heads)


def put_online_residual(model: Any) -> None:
    """Let the first block turn the residual stream, and the last one turn it back.

    Raises:
        RotqError: the family's blocks are not known.
    """
    _, blocks = _blocks(model)
    signs_D = torch.ones(model.config.hidden_size, dtype=torch.int8, device="meta")
    for index in sorted({0, len(blocks) - 1}):
        turn_ends(blocks[index], signs_D, first=index == 0, last=index == len(blocks) - 1)


def _blocks(model: Any) -> tuple[Adapter, nn.ModuleList]:
    """What is known of the family, and the model's blocks."""
    from rotq.models.generic import located
    from rotq.models.registry import find_adapter

    adapter = located(find_adapter(model.config), model)
    blocks = adapter.blocks
    if model.base_model is model and not adapter.part:
        # without a head, and the prefix that names have below one
        blocks = blocks.removeprefix(f"{model.base_model_prefix}.")
    return adapter, model.get_submodule(blocks)


def num_parameters(
    model: Any, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """As transformers counts them, and a packed weight as the weights that it stands for."""
    number = int(type(model).num_parameters(model, only_trainable, exclude_embeddings))
    if only_trainable:
        return number
    kinds = QuantLinear if exclude_embeddings else PackedWeight
    packed = [module for module in model.modules() if isinstance(module, kinds)]
    return number + sum(prod(layer.shape) for layer in packed)


def register() -> None:
    """Make the rotq format known to transformers; again is harmless."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, RotqConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, RotqHfQuantizer)


def _entries(files: Iterable[str]) -> list[Entry]:
    return [entry for file in files for entry in read_entries(Path(file))]


def _is_new(name: str, scheme: Scheme, prefix: str, entries: dict[str, Entry]) -> bool:
    """Whether a layer is none of the checkpoint's: a head that was put on what it holds.

    Its class is all that makes the scheme mean it, the file has nothing of it, and it is no part of
    a block.
    """
    in_a_block = any(part.isdecimal() for part in name.split("."))
    is_there = any(f"{name}.{leaf}" in entries for leaf in ("weight", "weight_packed"))
    return not in_a_block and not is_there and not scheme.names(name, prefix)


register()
exl3_loading.register()
