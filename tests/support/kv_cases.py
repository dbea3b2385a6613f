"""Constants and tokens for the tests of the KV cache, as calibration would make them; pages."""

import math
from dataclasses import replace

import torch

from rotq_kernels.kv.format import KVConstants, KVFormat, KVPages, SideConstants

LLOYD_MAX = {2: [1, 3], 3: [1, 3, 5, 9], 4: [3, 9, 15, 22, 29, 37, 48, 63]}
"""Positive levels, near those for the unit normal."""
UNITS = {2: 0.4955, 3: 0.2438, 4: 0.0432, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""Worth of a level in units of the standard deviation."""


def side_of(
    num_heads: int, head_dim: int, bits: int, *, seed: int, gain: str = "lsq", mean: float = 1.0
) -> SideConstants:
    """Random well-conditioned matrices and means; a level table of its own for each head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    turn_HDD = torch.linalg.qr(normal(num_heads, head_dim, head_dim)).Q
    stretch_HD = torch.exp(0.3 * normal(num_heads, head_dim))
    matrix_HDD = turn_HDD * stretch_HD[:, None]
    if bits <= 4:
        positive = torch.tensor(LLOYD_MAX[bits])
        level_L = torch.cat([-positive.flip(0), positive])
    else:
        level_L = torch.arange(2**bits) - (2**bits - 1) / 2
    threshold_L = (level_L[1:] + level_L[:-1]) / 2 * UNITS[bits]
    wobble_H1 = 1 + 0.01 * torch.arange(num_heads)[:, None]
    levels_HL = torch.empty(num_heads, 0, dtype=torch.int8)
    if bits <= 4:
        # outer levels a step apart from head to head
        outer_HL = torch.arange(num_heads)[:, None] % 2 * (level_L.abs() == level_L.abs().max())
        levels_HL = (level_L + outer_HL * level_L.sign()).to(torch.int8)
    return SideConstants(
        matrix_HDD=matrix_HDD,
        inverse_HDD=(turn_HDD / stretch_HD[:, None]).mT.contiguous(),
        mean_HD=mean * normal(num_heads, head_dim),
        levels_HL=levels_HL,
        thresholds_HL=threshold_L * wobble_H1,
        base_H=torch.full((num_heads,), -12.0) + 0.1 * torch.arange(num_heads),
        gain=gain,  # type: ignore[arg-type]
        unit_H=torch.full((num_heads,), UNITS[bits]),
    )


def transform_of(
    form: KVFormat,
    num_heads: int,
    *,
    mean: str = "rope",
    gain: str = "lsq",
    rotary_pairs: int | None = None,
    seed: int = 0,
) -> KVConstants:
    """Constants of a layer; partial RoPE with ``rotary_pairs`` below half the head."""
    D = form.head_dim
    R = D // 2 if rotary_pairs is None else rotary_pairs
    has_rope, qjl = mean == "rope", form.residual == "qjl"
    generator = torch.Generator().manual_seed(seed + 7)
    sketch_DD = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    key_scale = {"none": 0.0, "static": 1.0, "rope": 1.0}[mean]
    if form.norm == "none":
        gain = "none"
    key = side_of(num_heads, D, form.k_bits, seed=seed + 1, gain=gain, mean=key_scale)
    value = side_of(num_heads, D, form.v_bits, seed=seed + 2, gain=gain, mean=0.3)
    if form.norm == "none":
        for side, bits in ((key, form.k_bits), (value, form.v_bits)):
            side.base_H.fill_(float(torch.tensor(UNITS[bits]).log2()))
    scale = 0.2 / UNITS[form.k_bits] if form.residual == "sign" else 0.8
    return KVConstants(
        format=form,
        key=key,
        value=value,
        mean=mean,  # type: ignore[arg-type]
        inv_freq_R=10000.0 ** (-torch.arange(R) / R) if has_rope else None,
        rotary_scale=1.1 if has_rope else 1.0,
        sketch_DD=sketch_DD if qjl else None,
        residual_scale_H=torch.full((num_heads,), scale) if form.residual != "none" else None,
        gamma_base_H=torch.full((num_heads,), -14.0) if qjl else None,
    )


def tokens_of(
    transform: KVConstants, batch: int, length: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, H, T, D) of unit scale; keys without their mean."""
    H, D = transform.key.mean_HD.shape
    generator = torch.Generator().manual_seed(seed + 100)
    k_BHTD = torch.randn(batch, H, length, D, generator=generator)
    return k_BHTD, torch.randn(batch, H, length, D, generator=generator)


def paged_slots(
    lengths: list[int], page_size: int, *, spare: int = 1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Shuffled pages for ragged sequences: slots (B, T), -1 beyond a length; page table; pages."""
    needed = [-(-length // page_size) for length in lengths]
    num_pages = sum(needed) + spare
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist()
    table_BJ = torch.full((len(lengths), max(needed)), -1, dtype=torch.int32)
    slot_BT = torch.full((len(lengths), max(lengths)), -1, dtype=torch.int64)
    for b, length in enumerate(lengths):
        for j in range(needed[b]):
            table_BJ[b, j] = order.pop()
        token_T = torch.arange(length)
        slot_BT[b, :length] = table_BJ[b, token_T // page_size] * page_size + token_T % page_size
    return slot_BT, table_BJ, num_pages


def dirty_pages(form: KVFormat, num_pages: int, num_heads: int) -> KVPages:
    """Pages with every bit set, so that bits not written show."""
    pages = KVPages.empty(form, num_pages, num_heads)
    for tensor in pages.tensors():
        tensor.view(torch.uint8).fill_(255)
    return pages


def assert_same_pages(actual: KVPages, expected: KVPages) -> None:
    """All tensors, bit by bit."""
    for one, other in zip(actual.tensors(), expected.tensors(), strict=True):
        # bytes, as dirty fp16 is NaN
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def in_blocks(form: KVFormat, num_pages: int, num_heads: int) -> tuple[KVPages, torch.Tensor]:
    """Pages of zeros as slices of blocks of bytes that have other bytes between them."""
    whole = KVPages.empty(form, num_pages, num_heads)
    names = ("k_codes", "v_codes", "k_norm", "v_norm", "k_sign", "k_gamma")
    held = {name: tensor for name in names if (tensor := getattr(whole, name)) is not None}
    widths = {
        name: math.prod(tensor.shape[1:]) * tensor.dtype.itemsize for name, tensor in held.items()
    }
    block_PC = torch.full((num_pages, sum(widths.values()) + 64), 0xA5, dtype=torch.uint8)
    parts, at = {}, 32
    for name, width in widths.items():
        block_PC[:, at : at + width] = 0
        parts[name] = block_PC[:, at : at + width].view(held[name].dtype).view(held[name].shape)
        at += width
    return replace(whole, **parts), block_PC
