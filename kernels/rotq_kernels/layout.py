"""The packed layouts of integer codes: of weights (``pack``) and of the KV cache (``pack_kv``).

Weights are a dense stream of bits, least significant bit first.
Along the packed dimension code i takes the bits [i * bits, (i + 1) * bits) of its row, and bit j
of the row is bit j % 32 of its int32 word j // 32. Words are straddled where ``bits`` does not
divide 32; the last word is filled with zeros. What is stored is q + 2^(bits-1), which is not
negative. This is the layout of ``weight_packed`` in compressed-tensors since 0.18.

Eight codes take exactly ``bits`` bytes, so the work goes by eights: an int64 word holds them,
and its first ``bits`` bytes are the stream. That needs a little-endian host.

Keys and values are packed for the kernels that read them: each chunk of 32 codes takes exactly
``bits`` words and no code straddles a word. Of a chunk, code 8 i + j is named (i, j):

    1 bit    bit k of the one word is code k (the signs of a residual)
    2 bits   two bits each: word 0 holds codes 0 to 15, word 1 codes 16 to 31
    3 bits   words 0, 1, 2: bits 0-2 of nibble j of word i are code (i, j); bit 3 of nibble j
             of word i is bit i of code (3, j)
    4 bits   nibble j of word i is code (i, j)
    5-7      four words of the codes' low nibbles as for 4 bits, then one word for each further
             bit, whose bit k is that of code k
    8 bits   byte j of word i is code 4 i + j

Three nibbles' worth of 3-bit codes leave the three top bits to the fourth, so that a word masked
with 0x77777777 is eight table indices in a row, as PRMT wants them.

Shape suffixes: N rows, K codes of a row, W int32 words of a row, E groups of eight codes,
C chunks of 32 codes, D head width.
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
        bits: 1 to 8; one bit is for symbols of a trellis.
        dim: Dimension that shrinks: 1 for weights, 0 for zero points and paths of a trellis.

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
        bits: 1 to 8.
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
    # flat first: a column of one word may have any stride, with which no bytes can be seen
    stream = packed_NW.contiguous().view(-1).view(torch.uint8).view(N, 4 * words)
    if bits in (1, 2, 4, 8):
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
    """Codes that never straddle a byte: 1, 2, 4 and 8 bits."""
    mask, half = 2**bits - 1, 2 ** (bits - 1)
    parts = [(stream >> shift) & mask for shift in range(0, 8, bits)]
    stored = torch.stack(parts, dim=-1).flatten(1)
    return stored.view(torch.int8).sub(half)


def _check(tensor: Tensor, dtype: torch.dtype, bits: int, dim: int) -> None:
    if tensor.ndim != 2 or tensor.dtype != dtype:
        raise ValueError(f"expected 2-D {dtype}, got {tensor.ndim}-D {tensor.dtype}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    if dim not in (0, 1):
        raise ValueError(f"dim must be 0 or 1, got {dim}")


def pack_kv(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of keys or values, chunk after chunk along the last dimension.

    Args:
        codes: uint8 (..., D), in [0, 2^bits - 1]; D is padded with zeros to whole chunks of 32.
        bits: 1 to 8.

    Returns:
        int32 (..., C * bits), words c * bits to c * bits + bits - 1 for chunk c; contiguous.

    Raises:
        ValueError: not uint8, ``bits`` out of range, or a code out of range.
    """
    if codes.dtype != torch.uint8 or not 1 <= bits <= 8:
        raise ValueError(f"expected uint8 codes of 1 to 8 bits, got {codes.dtype} and {bits}")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"a code is outside [0, {2**bits - 1}], the range of {bits} bits")
    D = codes.shape[-1]
    chunks = -(-D // 32)
    code_C32 = torch.nn.functional.pad(codes, (0, chunks * 32 - D)).to(torch.int32)
    code_C32 = code_C32.unflatten(-1, (chunks, 32))
    if bits in (1, 2, 4, 8):
        words = _join(code_C32, bits)
    elif bits == 3:
        code_C48 = code_C32.unflatten(-1, (4, 8))
        spare_C38 = (code_C48[..., 3:, :] >> _steps(3, codes.device)[:, None]) & 1
        words = _join((code_C48[..., :3, :] | spare_C38 << 3).flatten(-2), 4)
    else:
        planes = (code_C32[..., None, :] >> (4 + _steps(bits - 4, codes.device))[:, None]) & 1
        words = torch.cat([_join(code_C32 & 15, 4), _join(planes.flatten(-2), 1)], dim=-1)
    return words.flatten(-2)


def unpack_kv(words: Tensor, bits: int, head_dim: int) -> Tensor:
    """Undo ``pack_kv``.

    Args:
        words: int32 (..., C * bits).
        bits: 1 to 8.
        head_dim: D.

    Returns:
        uint8 (..., D).

    Raises:
        ValueError: not int32, ``bits`` out of range, or a wrong number of words.
    """
    if words.dtype != torch.int32 or not 1 <= bits <= 8:
        raise ValueError(f"expected int32 words of 1 to 8 bits, got {words.dtype} and {bits}")
    chunks = -(-head_dim // 32)
    if words.shape[-1] != chunks * bits:
        raise ValueError(
            f"{head_dim} codes of {bits} bits take {chunks * bits} words, got {words.shape[-1]}"
        )
    word_CW = words.unflatten(-1, (chunks, bits))
    if bits in (1, 2, 4, 8):
        code_C32 = _split(word_CW, bits)
    elif bits == 3:
        nibble_C38 = _split(word_CW, 4).unflatten(-1, (3, 8))
        spare_C8 = ((nibble_C38 >> 3) << _steps(3, words.device)[:, None]).sum(-2)
        code_C32 = torch.cat([(nibble_C38 & 7).flatten(-2), spare_C8], dim=-1)
    else:
        planes = _split(word_CW[..., 4:], 1).unflatten(-1, (bits - 4, 32))
        high_C32 = (planes << (4 + _steps(bits - 4, words.device))[:, None]).sum(-2)
        code_C32 = _split(word_CW[..., :4], 4) | high_C32
    return code_C32.flatten(-2)[..., :head_dim].to(torch.uint8)


def _join(fields: Tensor, width: int) -> Tensor:
    """int32 fields of ``width`` bits, the lowest first, to words: (..., W * 32 / width)."""
    each = 32 // width
    shifted = fields.unflatten(-1, (-1, each)) << width * _steps(each, fields.device)
    return shifted.sum(-1, dtype=torch.int32)


def _split(words: Tensor, width: int) -> Tensor:
    """Undo ``_join``."""
    shift = width * _steps(32 // width, words.device)
    return ((words[..., None] >> shift) & (2**width - 1)).flatten(-2)


def _steps(number: int, device: torch.device) -> Tensor:
    return torch.arange(number, dtype=torch.int32, device=device)
