"""Hadamard matrices by construction, the fast transform, and other orthogonal bases.

A Hadamard matrix of order n has entries +-1 and H H^T = n I. Built here for n = m * 2^a as
kron(C_m, S), S the Sylvester matrix of order 2^a and C_m the smallest core that Paley gives:

    Paley I    q = 3 mod 4:  order q + 1,      C = I + [[0, 1], [-1, Q]]
    Paley II   q = 1 mod 4:  order 2 (q + 1),  from the conference matrix [[0, 1], [1, Q]]:
               0 -> [[1, -1], [-1, -1]],  +-1 -> +-[[1, 1], [1, -1]]

q is a prime power and Q_ij = chi(a_i - a_j), chi the quadratic character of GF(q)
(R. Paley, On orthogonal matrices, J. Math. Phys. 12, 1933). Kronecker products of two cores give
no smaller core for any order up to MAX_CORE, so they are left out.

Activations are rows: they are multiplied from the right, x -> x D H / sqrt(n), with D random
signs.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from rotq import ops

MAX_CORE = 1024
"""Largest core that is built; it is multiplied as a dense matrix."""


@functools.cache
def core_order(n: int) -> int:
    """Order m of the smallest core with n = m * 2^a; 1 where n is a power of two.

    Raises:
        ValueError: no core up to MAX_CORE is known by Paley's constructions.
    """
    if n < 1:
        raise ValueError(f"a Hadamard matrix has a positive order, got {n}")
    m = n >> ((n & -n).bit_length() - 1)
    if m == 1:
        return 1
    while m <= min(n, MAX_CORE) and n % m == 0:
        if _paley_field(m) is not None:
            return m
        m *= 2
    reason = f"it is not m * 2^a with a core m up to {MAX_CORE} from Paley's constructions"
    if n % 4:
        reason = "orders are 1, 2 and multiples of 4"
    raise ValueError(
        f"no Hadamard matrix of order {n}: {reason}; "
        "dct exists for every order, block_hadamard for every even one"
    )


def hadamard(n: int) -> Tensor:
    """The (n, n) matrix H with entries +-1, int8; H H^T = n I.

    Raises:
        ValueError: the order cannot be constructed.
    """
    m = core_order(n)
    H = paley_core(m)
    for _ in range((n // m).bit_length() - 1):
        H = torch.kron(H, torch.tensor([[1, 1], [1, -1]], dtype=torch.int8))
    return H


def fast_hadamard(x: Tensor, n: int | None = None, signs_n: Tensor | None = None) -> Tensor:
    """Multiply consecutive runs of n features by D H / sqrt(n), from the right.

    A product with the core and with Sylvester matrices of at most 32: n (m + 32 a / 5) products a
    row instead of n^2. On a CUDA device a kernel does it, unless a gradient is wanted, or fp64.
    Differentiable in ``x``; fp32 products are exact ones except in a differentiated call, where
    torch's setting holds.

    Args:
        x: (..., K) with K a multiple of n, floating point; fp16 and bf16 are summed in fp32.
        n: Order of the transform; K where it is not given.
        signs_n: +1 and -1, the diagonal of D; None for all +1.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: n does not divide K, or the order cannot be constructed.
    """
    n = x.shape[-1] if n is None else n
    if x.shape[-1] % n:
        raise ValueError(f"{x.shape[-1]} features are not a multiple of the order {n}")
    signs_n = None if signs_n is None else signs_n.to(device=x.device, dtype=torch.int8)
    return _transformed(x, n, core_on(core_order(n), x.device), signs_n)


def inverse_hadamard(x: Tensor, signs_n: Tensor) -> Tensor:
    """Multiply by (D H)^T / sqrt(n), from the right: takes back what ``fast_hadamard`` did.

    Args:
        x: (..., n), floating point; fp16 and bf16 are summed in fp32.
        signs_n: The diagonal of D, +1 and -1.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: the order cannot be constructed.
    """
    n = x.shape[-1]
    # kron(C, S)^T is kron(C^T, S): Sylvester's matrices are symmetric
    core_mm = core_on(core_order(n), x.device, transposed=True)
    return _transformed(x, n, core_mm, None) * signs_n.to(x)


def _transformed(x: Tensor, n: int, core_mm: Tensor, signs_n: Tensor | None) -> Tensor:
    rows = x.reshape(x.numel() // n, n)
    differentiated = x.requires_grad and torch.is_grad_enabled()
    has_kernel = x.device.type in ("cpu", "cuda")
    plain = x.dtype == torch.float64 or differentiated or not has_kernel
    transform = ops.hadamard_reference if plain else ops.hadamard
    return transform(rows, core_mm, signs_n).reshape(x.shape)


def random_signs(n: int, seed: int) -> Tensor:
    """n values +-1, int8, from a CPU generator seeded with ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8) * 2 - 1


def orthogonal(kind: str, n: int, seed: int, block_size: int = -1) -> Tensor:
    """An orthogonal (n, n) matrix with random signs, fp64.

    Args:
        kind: ``hadamard``: D H / sqrt(n). ``block_hadamard``: the same in diagonal blocks. ``dct``:
            D C, C the orthonormal DCT-II, for any n.
        n: Order.
        seed: Of the signs D.
        block_size: Of block_hadamard; -1 for the largest power of two that divides n.

    Raises:
        ValueError: unknown kind, or the order does not exist for it.
    """
    return random_signs(n, seed)[:, None] * _fixed(kind, n, block_size)


def describe(kind: str, n: int, block_size: int = -1) -> str:
    """What ``orthogonal`` builds, for reports: ``hadamard 36x16`` has a core of order 36."""
    if kind == "hadamard":
        m = core_order(n)
        return f"hadamard {n}" if m in (1, n) else f"hadamard {m}x{n // m}"
    if kind == "block_hadamard":
        block = _block(n, block_size)
        return f"block_hadamard {n // block} blocks of {block}"
    return f"{kind} {n}"


def _block(n: int, block_size: int) -> int:
    """Features that are rotated together.

    Raises:
        ValueError: there is no such block.
    """
    block = n & -n if block_size == -1 else block_size
    if block == 1:
        raise ValueError(f"block_hadamard needs an even order, got {n}; dct takes any")
    if n % block:
        raise ValueError(f"blocks of {block} do not divide {n}")
    return block


def _fixed(kind: str, n: int, block_size: int = -1) -> Tensor:
    if kind == "hadamard":
        return hadamard(n).double() / math.sqrt(n)
    if kind == "block_hadamard":
        block = _block(n, block_size)
        return torch.kron(torch.eye(n // block, dtype=torch.float64), _fixed("hadamard", block))
    if kind == "dct":
        index = torch.arange(n, dtype=torch.float64)
        C = torch.cos(torch.pi / n * (index[:, None] + 0.5) * index) * math.sqrt(2 / n)
        C[:, 0] = 1 / math.sqrt(n)
        return C
    raise ValueError(f"unknown basis {kind!r}; known: hadamard, block_hadamard, dct")


@functools.cache
def paley_core(m: int) -> Tensor:
    """The Paley matrix of order m, int8, entries +-1; [[1]] for m = 1."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    field = _paley_field(m)
    assert field is not None, "core_order only gives orders that exist"
    p, k = field
    Q = _jacobsthal(p, k)
    q = p**k
    S = torch.ones(q + 1, q + 1, dtype=torch.int8)
    S[0, 0] = 0
    S[1:, 1:] = Q
    if m == q + 1:
        S[1:, 0] = -1
        return S + torch.eye(q + 1, dtype=torch.int8)
    zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    one = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    return torch.kron(S, one) + torch.kron(torch.eye(q + 1, dtype=torch.int8), zero)


@functools.cache
def core_on(m: int, device: torch.device, *, transposed: bool = False) -> Tensor:
    """``paley_core`` on a device, moved there once: a copy to a GPU waits for all it is doing."""
    core_mm = paley_core(m)
    return (core_mm.T.contiguous() if transposed else core_mm).to(device)


def _paley_field(m: int) -> tuple[int, int] | None:
    """(p, k) of the field GF(p^k) that gives a core of order m; None where there is none."""
    if m % 4:
        return None
    first, second = _prime_power(m - 1), _prime_power(m // 2 - 1)
    if first is not None:  # m - 1 = 3 mod 4 for every m = 0 mod 4
        return first
    return second if (m // 2 - 1) % 4 == 1 else None


def _prime_power(q: int) -> tuple[int, int] | None:
    if q < 3:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _jacobsthal(p: int, k: int) -> Tensor:
    """Q_ij = chi(a_i - a_j) over GF(p^k), int8: 1 for squares, -1 for the others, 0 for zero.

    Elements are polynomials over Z_p, stored as k digits. chi comes from the powers of a
    generator: even ones are the squares.
    """
    q = p**k
    digits_qk = torch.tensor(list(itertools.product(range(p), repeat=k)))
    place_k = p ** torch.arange(k - 1, -1, -1)
    chi_q = torch.zeros(q, dtype=torch.int8)
    for power, element in enumerate(_powers(p, k)):
        chi_q[int((torch.tensor(element) * place_k).sum())] = 1 - 2 * (power % 2)
    difference_qqk = (digits_qk[:, None] - digits_qk[None, :]) % p
    return chi_q[(difference_qqk * place_k).sum(-1)]


def _powers(p: int, k: int) -> list[tuple[int, ...]]:
    """1, x, x^2, ... up to order p^k - 1, modulo the first polynomial for which x generates.

    A monic polynomial x^k = c_1 x^(k-1) + ... + c_k under which x has order p^k - 1 is
    irreducible (primitive), so no separate test is needed.
    """
    one = (0,) * (k - 1) + (1,)
    for tail in itertools.product(range(p), repeat=k):
        powers = [one]
        while len(powers) < p**k:
            top, *rest = powers[-1]
            following = tuple((d + top * c) % p for d, c in zip([*rest, 0], tail, strict=True))
            if following == one or not any(following):
                break
            powers.append(following)
        if len(powers) == p**k - 1 and following == one:
            return powers
    raise AssertionError(f"GF({p}^{k}) has a primitive polynomial")
