"""KV schemes of others as schemes of ``rotq eval kv``, from their formulae.

    kivi          keys per channel over 32 tokens, values per token over 32 channels, min to max
                  (KIVI, arXiv 2402.02750)
    kvarn         tiles of 128 tokens: Hadamard, then rows and columns brought to equal standard
                  deviations in turn (Sinkhorn, 16 times), min to max of a channel for keys, of a
                  token for values (KVarN, arXiv 2606.03458)
    oscar         keys in the eigenvectors of the queries' second moment, values in those of the
                  outputs', both mixed by a Hadamard matrix; min to max of a token, clipped by a
                  share fitted on calibration tokens (OSCAR, arXiv 2605.17757)
    vllm-tq       keys Hadamard, Lloyd-Max, the norm of the codes corrected; values min to max of a
                  token, not rotated; two layers at either end whole (vLLM's turboquant_3bit_nc and
                  4bit_nc)

Scales, zeros and norms are rounded to fp16 and counted as such. Tiles and groups start behind the
sinks; a last one that is not full is coded as it is, which in the peers' own code is kept whole: so
their windows of whole tokens are the ones that ``--sinks`` and ``--recent`` give to all.

Shape suffixes: B sequences, H KV heads, T tokens, N tokens of a tile, D head width, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotq.evaluation.quantized_history import Coder, KVScheme
from rotq.kv.calibration.codebook import normal_centres
from rotq.kv.calibration.layer_constants import hadamard_basis
from rotq.kv.calibration.statistics import LayerStatistics
from rotq.models.rotary import kv_shapes

GROUP, TILE = 32, 128
_SWEEPS = 16
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
_TINY = 1e-8

Sides = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values (B, H, T, D), fp32, all of them coded, as they come back."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A scheme by its name."""

    name: str
    k_bits: int
    v_bits: int
    sides: Callable[[Peer, LayerStatistics | None], Sides]
    """What codes a layer."""
    halves: Callable[[int], tuple[float, float]]
    """fp16 numbers for each key and for each value element, by the head's width."""
    boundary: int = 0
    """Layers at either end that are kept whole."""
    calibrated: bool = False
    """Whether it takes statistics of the model."""

    def stored_bits(self, head_dim: int) -> float:
        """Bits per element of a layer that is not kept whole, scales and zeros included."""
        return (self.k_bits + self.v_bits) / 2 + 16 * sum(self.halves(head_dim)) / 2


def scheme_of_peer(
    found: Peer, model: Any, statistics: Sequence[LayerStatistics], *, sinks: int, recent: int
) -> KVScheme:
    """A peer's coder for every layer of a model.

    Args:
        found: The peer.
        model: A causal language model of transformers.
        statistics: Of each layer, for a peer that is calibrated; else empty.
        sinks: First tokens kept whole.
        recent: Last tokens kept whole.
    """
    shapes = kv_shapes(model.config)
    whole_bits = 8 * model.dtype.itemsize
    coders, elements, bits = {}, 0, 0.0
    for layer, shape in enumerate(shapes):
        is_whole = min(layer, len(shapes) - 1 - layer) < found.boundary
        sides = (
            _whole if is_whole else found.sides(found, statistics[layer] if statistics else None)
        )
        coders[layer] = behind_sinks(sides, sinks)
        width = 2 * shape.num_heads * shape.head_dim
        elements += width
        bits += width * (whole_bits if is_whole else found.stored_bits(shape.head_dim))
    return KVScheme(
        name=found.name,
        coders=coders,
        sinks=sinks,
        recent=recent,
        stored_bits=bits / elements,
        elements=elements,
    )


def behind_sinks(sides: Sides, sinks: int) -> Coder:
    """A coder of all tokens but the first ones, which stay."""

    def code(k_BHTD: Tensor, v_BHTD: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        pair = sides(k_BHTD[:, :, sinks:].float(), v_BHTD[:, :, sinks:].float())
        k_hat_BHTD, v_hat_BHTD = k_BHTD.clone(), v_BHTD.clone()
        k_hat_BHTD[:, :, sinks:], v_hat_BHTD[:, :, sinks:] = pair
        return k_hat_BHTD, v_hat_BHTD

    return code


def _whole(k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
    return k_BHTD, v_BHTD


def round_last(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Codes from min to max of the last axis, both drawn in to ``clip`` of their way, decoded."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    middle = (low + high) / 2
    low, high = middle + clip * (low - middle), middle + clip * (high - middle)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=_TINY)
    zero = low.half().float()
    return ((x - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero


def _tiles(x_BHTD: Tensor, tokens: int, code: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([code(part) for part in x_BHTD.split(tokens, dim=2)], dim=2)


def _kivi(found: Peer, _: LayerStatistics | None) -> Sides:
    def code(k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        k_hat_BHTD = _tiles(k_BHTD, GROUP, lambda part: round_last(part.mT, found.k_bits).mT)
        groups = v_BHTD.unflatten(-1, (-1, min(GROUP, v_BHTD.shape[-1])))
        return k_hat_BHTD, round_last(groups, found.v_bits).flatten(-2)

    return code


def balanced(x_BHND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A tile with rows and columns of equal standard deviation, and their factors in fp16.

    Returns:
        (B, H, N, D), and factors of its rows (B, H, N, 1) and columns (B, H, 1, D).
    """
    rows = x_BHND.new_zeros(*x_BHND.shape[:3], 1)
    columns = x_BHND.new_zeros(*x_BHND.shape[:2], 1, x_BHND.shape[3])
    for _ in range(_SWEEPS):
        scaled = x_BHND * (-rows - columns).exp()
        columns = columns + _log_std(scaled, -2)
        scaled = x_BHND * (-rows - columns).exp()
        rows = rows + _log_std(scaled, -1)
        # only their sum counts; columns with large means would drive both out of fp16's range
        shift = rows.mean(2, keepdim=True)
        rows, columns = rows - shift, columns + shift
    row_BHN1, column_BH1D = rows.exp().half().float(), columns.exp().half().float()
    return x_BHND / (row_BHN1 * column_BH1D).clamp(min=_TINY), row_BHN1, column_BH1D


def _log_std(x: Tensor, dim: int) -> Tensor:
    return x.var(dim=dim, keepdim=True, correction=0).sqrt().clamp(min=_TINY).log()


def _kvarn(found: Peer, _: LayerStatistics | None) -> Sides:
    def code(k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        basis_DD = hadamard_basis(k_BHTD.shape[-1]).to(k_BHTD)

        def key(part_BHND: Tensor) -> Tensor:
            even_BHND, row, column = balanced(part_BHND)
            return round_last(even_BHND.mT, found.k_bits).mT * row * column

        def value(part_BHND: Tensor) -> Tensor:
            even_BHND, row, column = balanced(part_BHND)
            return round_last(even_BHND, found.v_bits) * row * column

        k_hat_BHTD, v_hat_BHTD = (
            _tiles(x_BHTD @ basis_DD.mT, TILE, side) @ basis_DD
            for x_BHTD, side in ((k_BHTD, key), (v_BHTD, value))
        )
        return k_hat_BHTD, v_hat_BHTD

    return code


def _oscar(found: Peer, statistics: LayerStatistics | None) -> Sides:
    assert statistics is not None
    pairs = (
        (statistics.k_HND, statistics.plain_query_moment_HDD, found.k_bits),
        (statistics.v_HND, statistics.output_second_moment_HDD, found.v_bits),
    )
    fitted = [_rotated_and_clipped(*pair) for pair in pairs]

    def code(*sides: Tensor) -> tuple[Tensor, Tensor]:
        k_hat_BHTD, v_hat_BHTD = (
            _in_basis(x_BHTD, basis_HDD.to(x_BHTD), found.k_bits, clip)
            for x_BHTD, (basis_HDD, clip) in zip(sides, fitted, strict=True)
        )
        return k_hat_BHTD, v_hat_BHTD

    return code


def _rotated_and_clipped(x_HND: Tensor, moment_HDD: Tensor, bits: int) -> tuple[Tensor, float]:
    """Eigenvectors behind a Hadamard matrix, fp32 (H, D, D), and the clip that errs least."""
    vector_HDD = torch.linalg.eigh(moment_HDD.double()).eigenvectors
    basis_HDD = (hadamard_basis(x_HND.shape[-1]) @ vector_HDD.mT).float()
    errors = [
        float(_weighed(_in_basis(x_HND, basis_HDD, bits, clip) - x_HND, moment_HDD))
        for clip in _CLIPS
    ]
    return basis_HDD, _CLIPS[min(range(len(_CLIPS)), key=errors.__getitem__)]


def _in_basis(x: Tensor, basis_HDD: Tensor, bits: int, clip: float) -> Tensor:
    return round_last(x @ basis_HDD.mT, bits, clip) @ basis_HDD


def _weighed(e_HND: Tensor, moment_HDD: Tensor) -> Tensor:
    e_HND = e_HND.double()
    return ((e_HND @ moment_HDD) * e_HND).sum(-1).mean()


def _vllm(found: Peer, _: LayerStatistics | None) -> Sides:
    def code(k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        basis_DD = hadamard_basis(k_BHTD.shape[-1]).to(k_BHTD)
        level_L = normal_centres(found.k_bits).to(k_BHTD)
        y_BHTD = k_BHTD @ basis_DD.mT
        rms_BHT1 = y_BHTD.square().mean(-1, keepdim=True).sqrt().clamp(min=_TINY)
        edges_E = (level_L[1:] + level_L[:-1]) / 2
        coded_BHTD = level_L[torch.bucketize(y_BHTD / rms_BHT1, edges_E)]
        energy_BHT1 = coded_BHTD.square().mean(-1, keepdim=True).sqrt()
        norm_BHT1 = (rms_BHT1 / energy_BHT1).half().float()
        return (coded_BHTD * norm_BHT1) @ basis_DD, round_last(v_BHTD, found.v_bits)

    return code


def _peer(name: str, bits: tuple[int, int], sides: Any, halves: Any, **more: Any) -> Peer:
    return Peer(name=name, k_bits=bits[0], v_bits=bits[1], sides=sides, halves=halves, **more)


def _kvarn_halves(head_dim: int) -> tuple[float, float]:
    """Of a tile: scale and zero of a channel, scale of a token; and the other way round."""
    return 2 / TILE + 1 / head_dim, 1 / TILE + 2 / head_dim


PEERS: dict[str, Peer] = {
    found.name: found
    for found in (
        *(_peer(f"kivi-{n}", (n, n), _kivi, lambda _: (2 / GROUP, 2 / GROUP)) for n in (2, 3, 4)),
        *(
            _peer(f"kvarn-k{k}v{v}", (k, v), _kvarn, _kvarn_halves)
            for k, v in ((4, 2), (3, 3), (2, 2))
        ),
        _peer("oscar-int2", (2, 2), _oscar, lambda width: (2 / width, 2 / width), calibrated=True),
        *(
            _peer(f"vllm-tq{n}", (n, n), _vllm, lambda width: (1 / width, 2 / width), boundary=2)
            for n in (3, 4)
        ),
    )
}
