"""What a packed key or value is: the words that the KV kernels, their references and rotq share.

One layer, per KV head h. A key k_t (after RoPE, at position t) is stored as codes of y and a norm:

    y   = A_h (k_t - m_t)             m_t = R_t mu_h (RoPE mean), mu_h (static mean) or 0
    k_t ~ m_t + A_h^-1 s_t L_h[q]     q codes, L_h levels, s_t the token's norm
    score of a query x:  x.m_t + s_t (x A_h^-1).L_h[q]  [+ residual]

so that the query is turned once and no key ever is. A value is the same with its own matrix, mean
and levels; the mean and the inverse are applied once, to the output.

Levels are integers or half-integers, so that every 16-bit float holds them exactly: a table of
int8 for up to 4 bits, q - (2^bits - 1) / 2 above. The norm s_t includes the least-squares gain.

Norms are 8-bit logarithms (``log8``): s = 2^(base_h + code / 16), 16 octaves in steps of 4.4 %,
which adds 1.6e-4 of relative squared error to the 0.035 of 3-bit codes.

Residual (keys only): one more bit per element, bit 1 for +1, and the score gains
    sign:  s_t delta_h (x A_h^-1).sigma         sigma = sign(y - s_t L[q])
    qjl:   g_t c_h (x A_h^-1 S^T).sigma         sigma = sign(S (y - s_t L[q])), S (D, D),
           g_t = rms of y - s_t L[q], stored as s_t is

Shape suffixes: P pages, H KV heads, S tokens of a page, W words of a token, D head width,
L levels of a codebook, R rotary pairs, B sequences, N dense tokens, J pages of a sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

STEPS_PER_OCTAVE = 16
"""Steps of a ``log8`` norm code per factor of two."""

TABLE_BITS = 4
"""Up to here levels come from a table; above they are uniform."""


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """The stored shape of one layer's keys and values."""

    head_dim: int
    k_bits: int
    """2 to 8."""
    v_bits: int
    """2 to 8."""
    norm: Literal["log8", "float16", "none"] = "log8"
    """Of each token and head; ``none`` stores nothing, s is 2^base."""
    residual: Literal["none", "sign", "qjl"] = "none"
    """One more bit per key element."""
    page_size: int = 64
    """Tokens of a page."""

    def __post_init__(self) -> None:
        if not (2 <= self.k_bits <= 8 and 2 <= self.v_bits <= 8):
            raise ValueError(f"bits must be 2 to 8, got {self.k_bits} and {self.v_bits}")
        if self.head_dim < 1 or self.head_dim % 8:
            raise ValueError(f"head_dim must be a multiple of 8, got {self.head_dim}")
        if self.page_size < 16 or self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two from 16, got {self.page_size}")

    @property
    def chunks(self) -> int:
        """Runs of 32 elements that a head takes; the last one may be padded."""
        return -(-self.head_dim // 32)

    @property
    def norm_dtype(self) -> torch.dtype | None:
        """Of stored norms."""
        return {"log8": torch.uint8, "float16": torch.float16, "none": None}[self.norm]

    @property
    def bytes_per_token(self) -> int:
        """Stored bytes of one token of one KV head, key and value."""
        norm = 0 if self.norm_dtype is None else self.norm_dtype.itemsize
        planes = self.k_bits + self.v_bits + (self.residual != "none")
        return 4 * self.chunks * planes + norm * (3 if self.residual == "qjl" else 2)

    @property
    def bits_per_element(self) -> float:
        """Stored bits per key or value element, norms included; without sinks and window."""
        return 8 * self.bytes_per_token / (2 * self.head_dim)


@dataclass(kw_only=True)
class KVPages:
    """Packed keys and values of one layer, page by page; zeros where nothing was written.

    A page of each tensor is contiguous; from page to page a tensor may have any stride, so that
    pages may be parts of a larger store's blocks.
    """

    format: KVFormat
    k_codes: Tensor
    """int32 (P, H, S, chunks * k_bits), see ``layout.pack_kv``."""
    v_codes: Tensor
    """int32 (P, H, S, chunks * v_bits)."""
    k_norm: Tensor | None
    """uint8 or fp16 (P, H, S); None for ``norm="none"``."""
    v_norm: Tensor | None
    k_sign: Tensor | None
    """int32 (P, H, S, chunks): bit i of word c is element 32 c + i; None without residual."""
    k_gamma: Tensor | None
    """As ``k_norm``, for ``residual="qjl"``."""

    @classmethod
    def empty(
        cls, format: KVFormat, num_pages: int, num_heads: int, device: torch.device | str = "cpu"
    ) -> KVPages:
        """Pages of zeros."""
        shape = (num_pages, num_heads, format.page_size)

        def words(number: int) -> Tensor:
            return torch.zeros(*shape, number, dtype=torch.int32, device=device)

        def norms() -> Tensor | None:
            dtype = format.norm_dtype
            return None if dtype is None else torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            format=format,
            k_codes=words(format.chunks * format.k_bits),
            v_codes=words(format.chunks * format.v_bits),
            k_norm=norms(),
            v_norm=norms(),
            k_sign=words(format.chunks) if format.residual != "none" else None,
            k_gamma=norms() if format.residual == "qjl" else None,
        )

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        found = (self.k_codes, self.v_codes, self.k_norm, self.v_norm, self.k_sign, self.k_gamma)
        return [tensor for tensor in found if tensor is not None]

    @property
    def gaps(self) -> dict[str, int | None]:
        """Elements between pages of each tensor, by its name; see ``gap_of``."""
        return {
            "k_codes": gap_of(self.k_codes),
            "k_norm": gap_of(self.k_norm),
            "k_sign": gap_of(self.k_sign),
            "k_gamma": gap_of(self.k_gamma),
            "v_codes": gap_of(self.v_codes),
            "v_norm": gap_of(self.v_norm),
        }

    @property
    def has_whole_pages(self) -> bool:
        """Whether each page of each tensor is contiguous, as kernels need it."""
        kept = vars(self).get("_whole")
        if kept is None or kept[0] is not self.k_codes:
            whole = all(tensor[:1].is_contiguous() for tensor in self.tensors())
            kept = vars(self)["_whole"] = self.k_codes, whole
        return bool(kept[1])

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(tensor.nbytes for tensor in self.tensors())


@dataclass(kw_only=True)
class SideConstants:
    """How one side, keys or values, of one layer becomes codes. fp32 unless said otherwise."""

    matrix_HDD: Tensor
    """A: y = A x, that is rows x @ A.mT."""
    inverse_HDD: Tensor
    """A^-1: a query row becomes x @ A^-1; a row of output y becomes y @ A^-T. It may be larger
    by a factor, ``boost_HC``."""
    mean_HD: Tensor
    """Zeros where no mean is removed. Of keys before RoPE for ``mean="rope"``."""
    levels_HL: Tensor
    """int8 (H, 2^bits), ascending; for more than TABLE_BITS bits (H, 0)."""
    thresholds_HL: Tensor
    """(H, 2^bits - 1), ascending, in units of y / rms(y), or of y itself for ``norm="none"``:
    q is the number of thresholds below."""
    base_H: Tensor
    """log2 of the norm of code 0."""
    gain: Literal["lsq", "norm", "none"] = "lsq"
    """s = <y, L> / <L, L>, or |y| / |L|, or unit * rms(y)."""
    unit_H: Tensor
    """For ``gain="none"`` and ``search``: what a level of 1 is worth in units of rms(y)."""
    metric_HDD: Tensor | None = None
    """W: what an error of y costs, for ``search``; symmetric, positive on its diagonal."""
    search: int = 0
    """Elements of a token that may leave their nearest level for a better one together
    (``encode.search``); needs ``metric_HDD``, ``gain="lsq"`` and a norm."""
    boost_HC: Tensor | None = None
    """(H, 3): what ``inverse_HDD`` has been multiplied by for codes of 2, 3 and 4 bits, for who
    changes the bits; None for nothing. Kernels do not read it."""


@dataclass(kw_only=True)
class KVConstants:
    """All constants of one layer."""

    format: KVFormat
    key: SideConstants
    value: SideConstants
    mean: Literal["none", "static", "rope"] = "none"
    """What is removed from keys."""
    inv_freq_R: Tensor | None = None
    """Of RoPE, for ``mean="rope"``: pair i is elements (i, i + R), as transformers turns them;
    elements from 2 R on are not turned."""
    rotary_scale: float = 1.0
    """RoPE's attention factor on cosine and sine."""
    sketch_DD: Tensor | None = None
    """S, for ``residual="qjl"``."""
    residual_scale_H: Tensor | None = None
    """delta_h in units of a level, or c_h."""
    gamma_base_H: Tensor | None = None
    """log2 of the residual norm of code 0."""


@dataclass(kw_only=True)
class DenseKV:
    """Keys and values kept whole: sinks, the recent window, the chunk being processed."""

    k_BHND: Tensor
    v_BHND: Tensor
    position_BN: Tensor
    """int32 RoPE positions; -1 where there is no token."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Of a chunk whose queries see all before them, but for windows; the host knows it unasked.

    The dense tokens end with those of the chunk, in the order of its queries; what is padding among
    them is at the end.
    """

    packed: int
    """Packed tokens of each sequence."""
    skipped: int
    """Dense tokens at the beginning that are at no position, in all sequences."""
    end: int
    """Position behind the last query; with a window that is not wider, all is seen too."""


@dataclass(kw_only=True)
class KVHistory:
    """What the queries of one layer can see: packed tokens, and tokens kept whole."""

    pages: KVPages
    page_table_BJ: Tensor
    """int32, page j of sequence b; not read beyond a length."""
    length_B: Tensor
    """int32, packed tokens of each sequence; 0 is allowed."""
    start_B: Tensor
    """int32: packed token j of sequence b is at position start_B[b] + j."""
    constants: KVConstants
    hidden_B: Tensor | None = None
    """int32: so many packed tokens at the start of a sequence are not seen, because they are among
    the dense ones; None for none of any."""
    dense: DenseKV | None = None
    """Sinks, recent tokens and the chunk that the queries are of."""
    window: int = 0
    """Of sliding attention in tokens; 0 for none."""
    extent: Extent | None = None
    """None where a query may not see something before it, or the host does not know."""
    worked_out: dict[int, Any] | None = None
    """By window, what attention on a CPU has worked out of lengths and positions, where several
    layers have the same; None where no other has."""


def gap_of(stored_PHS: Tensor | None) -> int | None:
    """Elements between a page and the next; None where there are none, or nothing is stored.

    Kernels are compiled without them for None, so that pages of their own cost nothing.
    """
    if stored_PHS is None:
        return None
    # not by is_contiguous(), to which a single page of joint ones is, and two are not
    return stored_PHS.stride(0) - math.prod(stored_PHS.shape[1:]) or None


def level_values(levels_HL: Tensor, bits: int) -> Tensor:
    """fp32 (H, 2^bits): what each code stands for."""
    if bits <= TABLE_BITS:
        return levels_HL.float()
    codes_L = torch.arange(2**bits, device=levels_HL.device, dtype=torch.float32)
    return (codes_L - (2**bits - 1) / 2).expand(levels_HL.shape[0], -1)


def level_words(levels_HL: Tensor, bits: int) -> Tensor | None:
    """The table that kernels look up: rows of int8 as int32 words; None above TABLE_BITS."""
    return levels_HL.contiguous().view(torch.int32) if bits <= TABLE_BITS else None


def encode_norm(norm: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Store norms: uint8 logarithms, nearest, clamped at both ends, or a cast to fp16.

    Args:
        norm: fp32, not negative; 0 becomes code 0.
        base: Broadcasts over ``norm``.
        dtype: uint8 or float16.
    """
    if dtype != torch.uint8:
        return norm.to(dtype)
    code = (norm.log2() - base) * STEPS_PER_OCTAVE
    return code.clamp(0, 255).round().to(torch.uint8)


def decode_norm(stored: Tensor, base: Tensor) -> Tensor:
    """fp32 norms of what ``encode_norm`` stored."""
    if stored.dtype != torch.uint8:
        return stored.float()
    return torch.exp2(base + stored.float() / STEPS_PER_OCTAVE)
