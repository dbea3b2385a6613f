"""What a checkpoint keeps dense, in the dtype that it is stored in.

A job on a checkpoint in fp32 computes in fp32 and stores matrices in bf16: embeddings, the head,
layers that are kept. They are rounded before anything is measured, so that what is calibrated and
checked is what is stored; the stored ones are the same numbers in fewer bytes, and config.json
keeps the dtype that the model computes in. Vectors, as gains of norms and biases, stay: they are a
thousandth of the bytes.

Where a job computes in fp32 because the CPU has no products in the model's dtype, all that is
stored has the model's dtype, vectors too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a weight that is no vector."""
    return name.endswith("weight") and tensor.ndim > 1 and tensor.is_floating_point()


def is_global(name: str) -> bool:
    """Whether a tensor is the global scale of a layer's weight or inputs, which is always fp32."""
    return name.endswith("_global_scale")


def rest_in(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, others: Mapping[torch.dtype, torch.dtype]
) -> dict[str, Tensor]:
    """The same tensors by name.

    Args:
        dtype: Of matrices.
        others: From the dtype that another tensor has to the one that it gets; those of other
            dtypes, and global scales, stay as they are.
    """

    def wanted(name: str, tensor: Tensor) -> torch.dtype:
        if is_matrix(name, tensor):
            return dtype
        return tensor.dtype if is_global(name) else others.get(tensor.dtype, tensor.dtype)

    return {name: tensor.to(wanted(name, tensor)) for name, tensor in tensors.items()}


def module_in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a module with its floats in ``dtype``, global scales as they are."""
    made = copy.deepcopy(module)
    kept = {name: buffer for name, buffer in made.named_buffers() if is_global(name)}
    made.to(dtype)
    for name, buffer in kept.items():
        path, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(path), leaf, buffer)
    return made


@torch.no_grad()
def round_rest(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Round matrices to values that ``dtype`` has, in place; they keep their own."""
    for name, tensor in tensors.items():
        if is_matrix(name, tensor) and tensor.dtype != dtype:
            tensor.copy_(tensor.to(dtype))
