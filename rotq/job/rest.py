"""What a checkpoint keeps dense, in the dtype that it is stored in.

A job on a checkpoint in fp32 computes in fp32 and stores matrices in bf16: embeddings, the head,
layers that are kept. They are rounded before anything is measured, so that what is calibrated and
checked is what is stored; the stored ones are the same numbers in fewer bytes, and config.json
keeps the dtype that the model computes in. Vectors, as gains of norms and biases, stay: they are a
thousandth of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a weight that is no vector."""
    return name.endswith("weight") and tensor.ndim > 1 and tensor.is_floating_point()


def rest_in(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors by name, matrices in ``dtype``."""
    return {
        name: tensor.to(dtype) if is_matrix(name, tensor) else tensor
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def round_rest(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Round matrices to values that ``dtype`` has, in place; they keep their own."""
    for name, tensor in tensors.items():
        if is_matrix(name, tensor) and tensor.dtype != dtype:
            tensor.copy_(tensor.to(dtype))
