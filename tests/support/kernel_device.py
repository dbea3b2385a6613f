"""Where Triton's kernels run in tests: the GPU if there is one, else the interpreter.

Cases are made on the CPU, as their references and oracles are; what a kernel is given is moved, in
the strides that it has and with the memory around it, and what comes back is moved again.
"""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor

from rotq_kernels.kv.attention import packed_attention_triton
from rotq_kernels.kv.encode.launch import encode_kv_triton
from rotq_kernels.kv.format import KVConstants, KVHistory, KVPages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(value: Any) -> Any:
    """A tensor, or a dataclass, list or tuple of such, where kernels run; itself if it is there."""
    if DEVICE == "cpu":
        return value
    if isinstance(value, Tensor):
        whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(DEVICE)
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, list | tuple):
        return type(value)(on_device(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{k: on_device(v) for k, v in held.items()})
    return value


def attend_by_kernel(
    q_BMTD: Tensor,
    position_BT: Tensor,
    history: KVHistory,
    *,
    by: Any = packed_attention_triton,
    **options: Any,
) -> Tensor:
    """The result of ``by`` on the CPU."""
    found: Tensor = by(*(on_device(item) for item in (q_BMTD, position_BT, history)), **options)
    return found.cpu()


def encode_by_kernel(
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    position_BT: Tensor,
    slot_BT: Tensor,
    constants: KVConstants,
    pages: KVPages,
) -> None:
    """``encode_kv_triton``; ``pages`` are modified where they are."""
    there: KVPages = on_device(pages)
    tokens = (on_device(tensor) for tensor in (k_BHTD, v_BHTD, position_BT, slot_BT))
    encode_kv_triton(*tokens, on_device(constants), there)
    for own, result in zip(pages.tensors(), there.tensors(), strict=True):
        if own is not result:
            own.copy_(result)
