"""PTX's prmt, by its definition, for the interpreter, which knows no inline assembly."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32 in its default mode (PTX ISA, "Data Movement: prmt"): of the bytes of {b, a},
    nibble i of the selector names, in its lower three bits, the one that becomes byte i; its top
    bit asks for eight copies of that byte's sign instead."""
    a, b, selector = (np.asarray(x).astype(np.int64) & 0xFFFFFFFF for x in (a, b, selector))
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint64)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = (both >> (8 * (nibble & 7)).astype(np.uint64)) & np.uint64(255)
        byte = np.where(nibble & 8, np.where(byte & np.uint64(128), 255, 0), byte)
        result |= byte.astype(np.uint64) << np.uint64(8 * i)
    return result.astype(np.uint32).view(np.int32)


class _Call:
    def __init__(self, result: TensorHandle) -> None:
        self.result = result

    def get_result(self, index: int) -> TensorHandle:
        assert index == 0
        return self.result


def emulate_prmt(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the interpreter run the one instruction; returns the list of those that it ran.

    Where kernels run on a GPU nothing is emulated, and the list stays empty.
    """
    ran: list[str] = []

    def create(
        self: Any, asm: str, constraints: str, values: Sequence[Any], types: Any, *_: Any
    ) -> _Call:
        assert (asm, constraints) == ("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")
        ran.append(asm)
        a, b, selector = (value.data for value in values)
        return _Call(TensorHandle(prmt(a, b, selector), values[0].dtype.scalar))

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create)
    return ran
