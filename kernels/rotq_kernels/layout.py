"""The packed layout of integer codes: a dense stream of bits, least significant bit first.

Along the packed dimension code i takes the bits [i * bits, (i + 1) * bits) of its row, and bit j
of the row is bit j % 32 of its int32 word j // 32. Words are straddled where ``bits`` does not
divide 32; the last word is filled with zeros. What is stored is q + 2^(bits-1), which is not
negative. This is the layout of ``weight_packed`` in compressed-tensors since 0.18.

Eight codes take exactly ``bits`` bytes, so the work goes by eights: an int64 word holds them,
and its first ``bits`` bytes are the stream. That needs a little-endian host.

Shape suffixes: N rows, K codes of a row, W int32 words of a row, E groups of eight codes.
"""

import torch
from torch import Tensor


def packed_words(num_codes: int, bits: int) -> int:
    """int32 words that ``num_codes`` codes take."""
    return -(-num_codes * bits // 32)


def pack(q_NK: Tensor, bits: int, *, dim: int = 1) -> Tensor:
    """Pack signed codes.

    Args:
        q_NK: int8, in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 2 to 8.
        dim: Dimension that shrinks: 1 for weights, 0 for zero points.

    Returns:
        int32, (N, ceil(K * bits / 32)), or (ceil(N * bits / 32), K) for ``dim`` 0; contiguous.

    Raises:
        ValueError: not 2-D int8, ``bits`` or ``dim`` out of range, or a code out of range.
    """
    _check(q_NK, torch.int8, bits, dim)
    half = 2 ** (bits - 1)
    if q_NK.numel() and (int(q_NK.min()) < -half or int(q_NK.max()) >= half):
        raise ValueError(f"a code is outside [{-half}, {half - 1}], the range of {bits} bits")
    if dim == 0:
        return pack(q_NK.T, bits).T.contiguous()
    N, K = q_NK.shape
    eights = -(-K // 8)
    # padding with the lowest code, stored as zero
    q_NE8 = torch.nn.functional.pad(q_NK, (0, eights * 8 - K), value=-half).view(N, eights, 8)
    word_NE = torch.zeros(N, eights, dtype=torch.int64, device=q_NK.device)
    for i in range(8):
        word_NE |= (q_NE8[..., i].to(torch.int64) + half) << (bits * i)
    stream = word_NE.view(torch.uint8).view(N, eights, 8)[..., :bits].reshape(N, eights * bits)
    packed_NW = torch.zeros(N, packed_words(K, bits), dtype=torch.int32, device=q_NK.device)
    # whole eights can end with bytes of padding that the last word has no room for
    used = min(4 * packed_NW.shape[1], eights * bits)
    packed_NW.view(torch.uint8)[:, :used] = stream[:, :used]
    return packed_NW


def unpack(packed_NW: Tensor, bits: int, num_codes: int, *, dim: int = 1) -> Tensor:
    """Undo ``pack``.

    Args:
        packed_NW: int32, the words of ``num_codes`` codes along ``dim``.
        bits: 2 to 8.
        num_codes: K for ``dim`` 1, N for ``dim`` 0.
        dim: Dimension that grows.

    Returns:
        int8 (N, K), in [-2^(bits-1), 2^(bits-1) - 1].

    Raises:
        ValueError: not 2-D int32, ``bits`` or ``dim`` out of range, or too few or too many words.
    """
    _check(packed_NW, torch.int32, bits, dim)
    if dim == 0:
        return unpack(packed_NW.T.contiguous(), bits, num_codes).T.contiguous()
    N, words = packed_NW.shape
    if words != packed_words(num_codes, bits):
        raise ValueError(
            f"{num_codes} codes of {bits} bits take {packed_words(num_codes, bits)} words, "
            f"got {words}"
        )
    stream = packed_NW.contiguous().view(torch.uint8)
    if bits in (2, 4, 8):
        return _unpack_bytes(stream, bits)[:, :num_codes].contiguous()
    eights = -(-num_codes // 8)
    stream = torch.nn.functional.pad(stream, (0, eights * bits - stream.shape[1]))
    byte_NE8 = torch.nn.functional.pad(stream.view(N, eights, bits), (0, 8 - bits))
    word_NE = byte_NE8.view(torch.int64).squeeze(-1)
    q_NE8 = torch.empty(N, eights, 8, dtype=torch.int8, device=packed_NW.device)
    mask, half = 2**bits - 1, 2 ** (bits - 1)
    for i in range(8):
        q_NE8[..., i] = ((word_NE >> (bits * i)) & mask) - half
    return q_NE8.view(N, eights * 8)[:, :num_codes].contiguous()


def _unpack_bytes(stream: Tensor, bits: int) -> Tensor:
    """Codes that never straddle a byte: 2, 4 and 8 bits."""
    mask, half = 2**bits - 1, 2 ** (bits - 1)
    parts = [(stream >> shift) & mask for shift in range(0, 8, bits)]
    stored = torch.stack(parts, dim=-1).flatten(1)
    return stored.view(torch.int8).sub(half)


def _check(tensor: Tensor, dtype: torch.dtype, bits: int, dim: int) -> None:
    if tensor.ndim != 2 or tensor.dtype != dtype:
        raise ValueError(f"expected 2-D {dtype}, got {tensor.ndim}-D {tensor.dtype}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if dim not in (0, 1):
        raise ValueError(f"dim must be 0 or 1, got {dim}")
