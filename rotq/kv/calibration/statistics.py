"""What calibration learns of a model's keys, values and queries, in one run over its windows.

    mean        of keys before RoPE (turned back), of keys after it, and of values
    queries     second moment M = sum_t w_t x_t x_t^T / sum_t w_t of each KV head's queries
    samples     tokens drawn at random: whatever else is wanted is computed from them

An error e_j of key j moves the output of query t by p_tj (x_t.e_j) (v_j - o_t), to first order.
With independent errors a query counts

    w_t = sum over earlier j of p_tj^2 |v_j - o_t|^2

which is small where attention rests on sinks, on the token itself, or on values that agree.

Sinks are left out throughout. Shape suffixes: B windows, T positions, H KV heads, G query heads
per KV head, Q queries of a chunk, S keys, N sampled tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from rotq.devices import double
from rotq.errors import RotqError
from rotq.kv.calibration.evidence import Evidence, shrunk
from rotq.models.attention.replaced import (
    AttentionCall,
    probabilities,
    replaced_attention,
    visible,
)
from rotq.models.limits import embedding_device, vocabulary_of
from rotq.models.registry import adapter_for
from rotq.models.rotary import KVShape, Rotary, kv_shapes, rotaries

_CHUNK = 256
"""Queries whose probabilities are held at a time."""


@dataclass(kw_only=True)
class LayerStatistics:
    """Of one layer; fp64, samples fp32; on the CPU."""

    shape: KVShape
    rotary: Rotary | None
    key_mean_HD: Tensor
    """Before RoPE; zeros where the rotary is unknown."""
    turned_key_mean_HD: Tensor
    """After RoPE."""
    value_mean_HD: Tensor
    query_moment_HDD: Tensor
    """Weighted as above, after RoPE, not centred."""
    plain_query_moment_HDD: Tensor
    """The same with equal weights."""
    output_second_moment_HDD: Tensor
    """Of attention's output, all query heads of a KV head together, not centred."""
    output_moment_HDD: Tensor | None
    """W^T W of the columns of the output projection that read each KV head's values; None where
    the projection is not known."""
    k_HND: Tensor
    """Sampled keys, after RoPE."""
    v_HND: Tensor
    position_N: Tensor
    """Positions of the samples."""
    evidence: Evidence
    """What the windows hold."""
    weight: float = 1.0
    """What samples count beside an identity of their size where moments are taken of them."""

    def shrunk(self) -> LayerStatistics:
        """The same as far as the windows say it, which is all of it for most; see ``evidence``."""
        weight = self.evidence.weight(self.shape.head_dim)
        if weight == 1:
            return self
        return replace(
            self,
            key_mean_HD=weight * self.key_mean_HD,
            turned_key_mean_HD=weight * self.turned_key_mean_HD,
            value_mean_HD=weight * self.value_mean_HD,
            query_moment_HDD=shrunk(self.query_moment_HDD, weight),
            plain_query_moment_HDD=shrunk(self.plain_query_moment_HDD, weight),
            weight=weight,
        )


@torch.inference_mode()
def collect(
    model: Any,
    ids_BT: Tensor,
    *,
    sinks: int,
    num_samples: int = 4096,
    seed: int = 0,
    on_window: Callable[[int, int], None] | None = None,
) -> list[LayerStatistics]:
    """Run a model over calibration windows.

    Args:
        model: A causal language model of transformers.
        ids_BT: int64 token ids.
        sinks: First tokens of a window that are left out.
        num_samples: Tokens that are kept, in all windows together.
        seed: Of their choice.
        on_window: Called with windows done and windows in all.

    Raises:
        RotqError: an attention that is not supported, or keys, values or queries that are not
            finite.
    """
    B, T = ids_BT.shape
    if sinks >= T:
        raise ValueError(f"windows of {T} tokens hold nothing behind {sinks} sinks")
    shapes, turns = kv_shapes(model.config), rotaries(model.config)
    evidence = Evidence.of(ids_BT, vocabulary_of(model))
    layers = [
        _Layer(shape, turn, sinks, evidence) for shape, turn in zip(shapes, turns, strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    each = min(T - sinks, -(-num_samples // B))

    def attention(call: AttentionCall) -> Tensor:
        return layers[call.layer].see(call, chosen_N)

    for window, ids_T in enumerate(ids_BT):
        order = torch.randperm(T - sinks, generator=generator)[:each]
        chosen_N = (order + sinks).sort().values
        with replaced_attention(model, attention):
            model(input_ids=ids_T[None].to(embedding_device(model)), use_cache=False)
        if on_window is not None:
            on_window(window + 1, B)
    outputs = output_moments(model, shapes)
    return [layer.finish(index, outputs[index]) for index, layer in enumerate(layers)]


class _Layer:
    """Sums over the windows of one layer."""

    def __init__(
        self, shape: KVShape, rotary: Rotary | None, sinks: int, evidence: Evidence
    ) -> None:
        self.shape, self.rotary, self.sinks, self.evidence = shape, rotary, sinks, evidence
        H, D = shape.num_heads, shape.head_dim
        self.sums_HD = torch.zeros(3, H, D, dtype=torch.float64)
        self.moments_HDD = torch.zeros(2, H, D, D, dtype=torch.float64)
        self.weights_H = torch.zeros(2, H, dtype=torch.float64)
        self.outputs_HDD, self.num_outputs = torch.zeros(H, D, D, dtype=torch.float64), 0
        self.tokens = 0
        self.samples: list[tuple[Tensor, Tensor, Tensor]] = []

    def see(self, call: AttentionCall, chosen_N: Tensor) -> Tensor:
        k_BHTD, v_BHTD = call.k_BKTD, call.v_BKTD
        if k_BHTD.shape[1::2] != (self.shape.num_heads, self.shape.head_dim):
            raise RotqError(f"layer {call.layer}: keys {tuple(k_BHTD.shape)} are not {self.shape}")
        q_BHGTD = call.q_BHTD.unflatten(1, (self.shape.num_heads, -1))
        self._add_means(k_BHTD[0].float(), v_BHTD[0].float())
        chosen_N = chosen_N.to(k_BHTD.device)
        k_HND, v_HND = (side[0, :, chosen_N].float().cpu() for side in (k_BHTD, v_BHTD))
        self.samples.append((k_HND, v_HND, chosen_N.cpu()))
        outputs = []
        for first in range(0, q_BHGTD.shape[3], _CHUNK):
            q_BHGQD = q_BHGTD[..., first : first + _CHUNK, :]
            outputs.append(self._attend(q_BHGQD, k_BHTD, v_BHTD, call, first))
        return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2)

    def finish(self, index: int, output_moment_HDD: Tensor | None) -> LayerStatistics:
        if not self.tokens:
            raise RotqError(f"attention of layer {index} did not run")
        means_HD = self.sums_HD / self.tokens
        moments_HDD = self.moments_HDD / self.weights_H.clamp(min=1e-300)[..., None, None]
        if not bool(torch.isfinite(means_HD).all() and torch.isfinite(moments_HDD).all()):
            raise RotqError(f"keys, values or queries of layer {index} are not finite")
        k_HND, v_HND, position_N = zip(*self.samples, strict=True)
        return LayerStatistics(
            shape=self.shape,
            rotary=self.rotary,
            key_mean_HD=means_HD[0],
            turned_key_mean_HD=means_HD[1],
            value_mean_HD=means_HD[2],
            query_moment_HDD=moments_HDD[0],
            plain_query_moment_HDD=moments_HDD[1],
            output_second_moment_HDD=self.outputs_HDD / self.num_outputs,
            output_moment_HDD=output_moment_HDD,
            k_HND=torch.cat(k_HND, dim=1),
            v_HND=torch.cat(v_HND, dim=1),
            position_N=torch.cat(position_N),
            evidence=self.evidence,
        )

    def _add_means(self, k_HTD: Tensor, v_HTD: Tensor) -> None:
        k_HTD, v_HTD = double(k_HTD[:, self.sinks :]), double(v_HTD[:, self.sinks :])
        position_T = torch.arange(self.sinks, self.sinks + k_HTD.shape[1], device=k_HTD.device)
        if self.rotary is not None:
            self.sums_HD[0] += self.rotary.turn_back(k_HTD, position_T).sum(1).cpu()
        self.sums_HD[1] += k_HTD.sum(1).cpu()
        self.sums_HD[2] += v_HTD.sum(1).cpu()
        self.tokens += k_HTD.shape[1]

    def _attend(
        self, q_BHGQD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, call: AttentionCall, first: int
    ) -> Tensor:
        num_queries = q_BHGQD.shape[3]
        visible_QS = visible(first, num_queries, call.window, q_BHGQD.device)
        end = visible_QS.shape[1]
        k_BHSD, v_BHSD = k_BHTD[:, :, None, :end], v_BHTD[:, :, None, :end]
        p_BHGQS = probabilities(q_BHGQD * call.scale @ k_BHSD.mT, visible_QS)
        output_BHGQD = p_BHGQS @ v_BHSD
        distance = v_BHSD.square().sum(-1)[..., None, :] - 2 * output_BHGQD @ v_BHSD.mT
        distance = (distance + output_BHGQD.square().sum(-1, keepdim=True)).clamp(min=0)
        share = (p_BHGQS.square() * distance).tril(first - 1)
        weight_BHGQ = share[..., self.sinks :].sum(-1)
        skipped = max(0, self.sinks - first)
        self._add_queries(q_BHGQD[0, ..., skipped:, :], weight_BHGQ[0, ..., skipped:])
        o_HND = double(output_BHGQD[0].flatten(1, 2))
        self.outputs_HDD += (o_HND.mT @ o_HND).cpu()
        self.num_outputs += o_HND.shape[1]
        return output_BHGQD

    def _add_queries(self, q_HGQD: Tensor, weight_HGQ: Tensor) -> None:
        q_HND = double(q_HGQD.flatten(1, 2))
        for index, weight_HN in enumerate((weight_HGQ, torch.ones_like(weight_HGQ))):
            weight_HN = double(weight_HN.flatten(1))
            self.moments_HDD[index] += (q_HND.mT @ (q_HND * weight_HN[..., None])).cpu()
            self.weights_H[index] += weight_HN.sum(1).cpu()


def output_moments(model: Any, shapes: list[KVShape]) -> list[Tensor | None]:
    """W^T W of each layer's output projection by KV head, fp64 (H, D, D); None where unknown."""
    adapter = adapter_for(model)
    if not adapter.attention:
        return [None] * len(shapes)
    blocks = cast(nn.ModuleList, model.get_submodule(adapter.blocks))
    moments: list[Tensor | None] = []
    for block, shape in zip(blocks, shapes, strict=True):
        linear = block.get_submodule(adapter.attention_output)
        weight_NK = _weight(linear, shape.num_heads * shape.group * shape.head_dim)
        split = (shape.num_heads, shape.group, shape.head_dim)
        weight_NHGD = weight_NK.cpu().double().unflatten(1, split)
        moments.append(torch.einsum("nhgd,nhge->hde", weight_NHGD, weight_NHGD))
    return moments


def _weight(linear: nn.Module, num_inputs: int) -> Tensor:
    if isinstance(linear, nn.Linear):
        return linear.weight
    # a packed layer: what it does to unit vectors
    first = next(iter((*linear.parameters(), *linear.buffers())))
    unit_KK = torch.eye(num_inputs, device=first.device)
    return (linear(unit_KK) - linear(torch.zeros_like(unit_KK[:1]))).mT
