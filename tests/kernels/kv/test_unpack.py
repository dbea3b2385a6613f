"""Unpacking in kernels: the codes that ``pack_kv`` packed, with and without prmt."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_device import DEVICE, is_interpreted, on_device
from prmt_emulation import emulate_prmt, prmt
from torch import Tensor

from rotq_kernels.kv.unpack import (
    bytes_of,
    code_of,
    from_lowest,
    halves_of,
    join_quads,
    load_table,
    load_words,
    permute,
    quads_of,
)
from rotq_kernels.layout import pack_kv

CHUNKS = 16


@triton.jit
def _permute(a_ptr, b_ptr, selector_ptr, out_ptr, SIZE: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    chosen = permute(tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(selector_ptr + i), PTX)
    tl.store(out_ptr + i, chosen)


@triton.jit
def _unpack(words_ptr, table_ptr, quads_ptr, bytes_ptr, halves_ptr, lowest_ptr,
            N: tl.constexpr, BITS: tl.constexpr, ABOVE: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    n = tl.arange(0, N)
    table = load_table(table_ptr, tl.program_id(0) + 1, BITS)
    if ABOVE:
        table, lowest = from_lowest(table, BITS)
        tl.store(lowest_ptr, lowest)
    words = load_words(words_ptr + n * BITS, None, BITS)
    a, b, c, d, e, f, g, h = quads_of(words, table, BITS, PTX)
    i = tl.arange(0, 8)
    joined = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
    tl.store(quads_ptr + n[:, None] * 8 + i[None, :], joined.reshape(N, 8))
    joined = join_quads(
        bytes_of(a), bytes_of(b), bytes_of(c), bytes_of(d),
        bytes_of(e), bytes_of(f), bytes_of(g), bytes_of(h),
    )  # fmt: skip
    i = tl.arange(0, 32)
    # (i, j, x, y, z) of byte 2 i + j and quad 4 x + 2 y + z
    spot = n[:, None] * 32 + i[None, :]
    tl.store(bytes_ptr + spot, joined.permute(0, 3, 4, 5, 1, 2).reshape(N, 32))
    joined = join_quads(
        halves_of(a, PTX), halves_of(b, PTX), halves_of(c, PTX), halves_of(d, PTX),
        halves_of(e, PTX), halves_of(f, PTX), halves_of(g, PTX), halves_of(h, PTX),
    )  # fmt: skip
    tl.store(halves_ptr + spot, joined.permute(0, 3, 4, 5, 1, 2).reshape(N, 32))


@triton.jit
def _code_of(out_ptr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 32)
    tl.store(out_ptr + i, code_of(i // 4, i % 4, BITS))


def code_order(bits: int) -> Tensor:
    order = torch.empty(32, dtype=torch.int32, device=DEVICE)
    _code_of[(1,)](order, bits)
    return order.cpu().long()


def levels_of(bits: int) -> Tensor:
    """int8 (2 heads, levels), ascending, up to both ends of int8."""
    generator = torch.Generator().manual_seed(bits)
    levels = torch.randperm(256, generator=generator)[: 2 * 2**bits].view(2, -1) - 128
    levels[1, :2] = torch.tensor([-128, 127])
    return levels.sort(dim=1).values.to(torch.int8).contiguous()


class Unpacked:
    """What the kernel makes of random codes, with the table of the second of two heads."""

    def __init__(self, bits: int, *, ptx: bool, above: bool = False) -> None:
        generator = torch.Generator().manual_seed(bits)
        self.codes = torch.randint(2**bits, (CHUNKS, 32), generator=generator, dtype=torch.uint8)
        self.codes[0], self.codes[1] = 2**bits - 1, 0
        self.levels = levels_of(bits) if 2 <= bits <= 4 else None
        table = None if self.levels is None else self.levels.view(torch.int32)
        quads = torch.empty(CHUNKS, 8, dtype=torch.int32, device=DEVICE)
        numbers = torch.empty(CHUNKS, 32, dtype=torch.int8, device=DEVICE)
        halves = torch.empty(CHUNKS, 32, dtype=torch.float16, device=DEVICE)
        lowest = torch.empty(1, device=DEVICE)
        _unpack[(1,)](
            on_device(pack_kv(self.codes, bits)), on_device(table), quads, numbers, halves, lowest,
            CHUNKS, bits, above, ptx,
        )  # fmt: skip
        self.quads, self.bytes, self.halves, self.lowest = (
            tensor.cpu() for tensor in (quads, numbers, halves, lowest)
        )
        self.ordered = self.codes[:, code_order(bits)]


def test_prmt_by_hand() -> None:
    a, b = np.int32(0x03020100), np.int32(0x77868504)
    for selector, expected in ((0x3210, 0x03020100), (0x7654, 0x77868504), (0x4140, 0x04010400),
                               (0xD5E6, 0xFF85FF86), (0xF0F0, 0)):  # fmt: skip
        assert int(prmt(a, b, np.int32(selector))) & 0xFFFFFFFF == expected


def test_portable_permute_is_prmt(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, selector = torch.randint(
        -(2**31), 2**31, (3, 4096), generator=generator, dtype=torch.int32
    )
    selector &= 0x77777777
    given = on_device((a, b, selector))
    portable, by_ptx = torch.empty_like(given[0]), torch.empty_like(given[0])
    _permute[(1,)](*given, portable, 4096, False)
    ran = emulate_prmt(monkeypatch)
    _permute[(1,)](*given, by_ptx, 4096, True)
    assert bool(ran) == is_interpreted()
    assert torch.equal(portable, by_ptx)
    assert np.array_equal(portable.cpu().numpy(), prmt(a.numpy(), b.numpy(), selector.numpy()))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_has_its_place(bits: int) -> None:
    assert sorted(code_order(bits).tolist()) == list(range(32))


@pytest.mark.parametrize("ptx", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_levels(bits: int, ptx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = emulate_prmt(monkeypatch)
    found = Unpacked(bits, ptx=ptx)
    assert bool(ran) == (ptx and is_interpreted())
    if found.levels is not None:
        expected = found.levels[1][found.ordered.long()]
    elif bits == 1:
        expected = 2 * found.ordered.to(torch.int8) - 1
    else:
        expected = found.ordered.view(torch.int8)
    assert torch.equal(found.bytes, expected)
    assert torch.equal(found.quads.view(torch.int8), expected)


@pytest.mark.parametrize("ptx", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_halves_above_the_lowest_level(
    bits: int, ptx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate_prmt(monkeypatch)
    found = Unpacked(bits, ptx=ptx, above=True)
    if found.levels is None:
        level = found.ordered.float() - (2**bits - 1) / 2
    else:
        level = found.levels[1][found.ordered.long()].float()
    assert torch.equal(found.halves.float() * 2**24 + found.lowest, level)
