"""Packed embeddings in a model of transformers, and heads that share them."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import nn

from rotq.checkpoint.configuration import torch_dtype
from rotq.checkpoint.safetensors import Entry
from rotq.checkpoint.scheme import Scheme
from rotq.errors import RotqError
from rotq.layers.packed_weight import PackedWeight
from rotq.layers.quant_embedding import QuantEmbedding, TiedHead, embedding_obstacle

TIES = "all_tied_weights_keys"
"""Where transformers keeps the name of each tied tensor, and of the one that it is tied to."""


def put_quant_embeddings(model: Any, scheme: Scheme, entries: dict[str, Entry]) -> None:
    """Replace the embeddings that ``scheme`` names and the checkpoint has packed, on meta.

    A head that is tied to one shares its codes, unless the checkpoint has a weight of its own for
    it.

    Args:
        model: Modified.
        entries: The checkpoint's tensors by our name.

    Raises:
        RotqError: an embedding cannot be packed, or its shape is not that of the model.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    for name, module in list(model.named_modules()):
        scale = entries.get(f"{name}.weight_scale")
        group = None if scale is None else scheme.group(name, prefix)
        if scale is None or group is None or isinstance(module, nn.Linear | PackedWeight):
            continue
        obstacle = embedding_obstacle(module)
        if obstacle is not None:
            raise RotqError(
                f"{name} is packed in the checkpoint, which rotq cannot run: {obstacle}"
            )
        try:
            packed = QuantEmbedding(
                module, group.grid, scale_dtype=torch_dtype(scale.dtype), device="meta"
            )
        except ValueError as error:
            raise RotqError(f"{name}: {error}") from error
        check_shapes(name, packed, entries)
        model.set_submodule(name, packed)
        _share(model, name, packed, entries)


def check_shapes(name: str, packed: PackedWeight, entries: dict[str, Entry]) -> None:
    """Compare a packed weight's buffers with the checkpoint's tensors.

    Raises:
        RotqError: one is missing, or has another shape.
    """
    for key, tensor in packed.state_dict().items():
        entry = entries.get(f"{name}.{key}")
        if entry is None:
            raise RotqError(f"the checkpoint has no tensor {name}.{key}")
        if entry.shape != tuple(tensor.shape):
            raise RotqError(
                f"{name}.{key} has shape {list(entry.shape)}, expected {list(tensor.shape)} for "
                f"{packed.shape[1]} columns of {packed.grid.bits} bits"
            )


def make_embeddings_dense(model: Any, dtype: torch.dtype) -> None:
    """Undo ``put_quant_embeddings``, with the values as they are, in place."""
    dense: dict[int, nn.Embedding] = {}
    heads = [(name, m) for name, m in model.named_modules() if isinstance(m, TiedHead)]
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantEmbedding):
            dense[id(module)] = module.dense(dtype)
            model.set_submodule(name, dense[id(module)])
    for name, head in heads:
        linear = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        linear.weight = dense[id(head.embedding)].weight
        linear.register_parameter("bias", head.bias)
        model.set_submodule(name, linear)
    if dense:
        for name in ("resize_token_embeddings", "tie_weights"):
            vars(model).pop(name, None)
        setattr(model, TIES, model.get_expanded_tied_weights_keys(all_submodels=True))


def _share(model: Any, name: str, packed: QuantEmbedding, entries: dict[str, Entry]) -> None:
    """Let heads that are tied to an embedding read its codes; transformers has no tie left then."""
    ties = dict(getattr(model, TIES, None) or {})
    for tied, other in list(ties.items()):
        if other != f"{name}.weight":
            continue
        del ties[tied]
        path = tied.removesuffix(".weight")
        if {tied, f"{tied}_packed"} & entries.keys():
            continue  # the checkpoint has it untied, whatever its configuration says
        head = model.get_submodule(path)
        if not isinstance(head, nn.Linear):
            raise RotqError(f"{tied} is tied to {name}, which is packed; rotq shares it with heads")
        model.set_submodule(path, TiedHead(packed, head.bias))
    setattr(model, TIES, ties)
    model.resize_token_embeddings = functools.partial(_refuse_resize, name)
    model.tie_weights = functools.partial(_tie_others, model)


def _refuse_resize(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise RotqError(
        f"{name} is packed, and its number of rows is fixed; load the model with packed=False, or "
        "call its dequantize(), and resize it then"
    )


def _tie_others(
    model: Any, missing_keys: set[str] | None = None, recompute_mapping: bool = True
) -> None:
    """In place of transformers': a head that shares a packed embedding has no weight to tie."""
    type(model).tie_weights(model, missing_keys, recompute_mapping=False)
