"""Bits of keys and values by layer: what the model's loss feels of each, and what a budget buys.

    loss of a side at b bits = 1/2 mean_t E_z (g_t.d_t)^2

g_t is the slope of - sum_t log p(z_t) at a token's attention output, z drawn from the model itself,
so that the mean of squares is the Fisher information, the curvature of the divergence from the
unquantized model; d_t is how far b bits of one layer's keys, or of its values, move that output.
Errors of different tokens, sides and layers count as independent (as in HAWQ-V2, arXiv 1911.03852).

Shape suffixes: B windows, T positions, H KV heads, G query heads per KV head, D head width,
Z draws, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.calibration.layer_constants import kv_format, recoded
from rotq.kv.codec import KVCodec
from rotq.kv.presets import KVSpec
from rotq.models.attention.replaced import AttentionCall, attend, replaced_attention, visible
from rotq.models.limits import embedding_device
from rotq.models.rotary import kv_shapes
from rotq.ops import KVConstants, KVFormat
from rotq.solvers.budget import spend

CHOICES = (2, 3, 4)
"""Bits that a side may have."""
WINDOWS, TOKENS = 2, 512
"""That losses are taken on, at most."""
_DRAWS = 4
_ROUNDING = 1 + 1e-9

Losses = dict[int, tuple[list[float], list[float]]]
"""By layer: of keys and of values, for each of ``CHOICES``; nats per token."""


def check_average(config: Any, spec: KVSpec) -> None:
    """Refuse an average that no bits of a model's layers have.

    Raises:
        RotqError: it is below what the fewest bits take with their norms.
    """
    if spec.average_bits is None:
        return
    shapes = kv_shapes(config)
    formats = [
        (kv_format(spec, shape.head_dim, layer, len(shapes)), shape.num_heads)
        for layer, shape in enumerate(shapes)
    ]
    least = _stored_bits(formats)
    if spec.average_bits < least:
        raise RotqError(
            f"--kv-bits {spec.average_bits:g} is below {least:g}, which 2 bits and norms take"
        )


def budgeted(
    layers: Mapping[int, KVConstants], losses: Losses, average_bits: float
) -> dict[int, KVConstants]:
    """The same constants with the bits that cost the loss least.

    Args:
        layers: Constants of all layers.
        losses: Of ``side_losses``.
        average_bits: Stored bits per element that keys and values may take together; see
            ``check_average``.
    """
    costs, norms, elements = [], 0.0, 0
    for constants in layers.values():
        low = replace(constants.format, k_bits=CHOICES[0], v_bits=CHOICES[0])
        heads, width = constants.key.base_H.numel(), 32 * low.chunks
        costs += 2 * [[float(heads * width * bits) for bits in CHOICES]]
        norms += heads * (8 * low.bytes_per_token - 2 * CHOICES[0] * width)
        elements += 2 * heads * low.head_dim
    tried = [loss for layer in layers for loss in losses[layer]]
    budget = average_bits * elements * _ROUNDING - norms
    chosen = [CHOICES[place] for place in spend(costs, tried, budget)]
    pairs = zip(chosen[::2], chosen[1::2], strict=True)
    return {
        layer: recoded(constants, *pair)
        for (layer, constants), pair in zip(layers.items(), pairs, strict=True)
    }


def _stored_bits(formats: Sequence[tuple[KVFormat, int]]) -> float:
    """Per element, of layers' formats and numbers of heads."""
    taken = sum(heads * form.head_dim * form.bits_per_element for form, heads in formats)
    return taken / sum(heads * form.head_dim for form, heads in formats)


def check_budget(spec: KVSpec, layers: Mapping[int, KVConstants]) -> None:
    """Raise ValueError where layers take more than their scheme allows on the average."""
    if spec.average_bits is None:
        return
    taken = _stored_bits([(held.format, held.key.base_H.numel()) for held in layers.values()])
    if taken > spec.average_bits * _ROUNDING:
        raise ValueError(f"its layers take {taken:g} bits, not {spec.average_bits:g}")


def kept_losses(source: Mapping[str, Any], layers: Mapping[int, KVConstants]) -> Losses | None:
    """Losses that a calibration was made with; None where there are none, or they cannot be."""
    held = source.get("losses")
    try:
        found_L2C = torch.tensor(held, dtype=torch.float64)
    except (TypeError, ValueError):
        return None
    if found_L2C.shape != (len(layers), 2, len(CHOICES)) or not bool((found_L2C >= 0).all()):
        return None
    pairs = [(keys, values) for keys, values in found_L2C.tolist()]
    return dict(zip(layers, pairs, strict=True))


def bits_chosen(layers: Mapping[int, KVConstants]) -> list[list[int]]:
    """Of keys and of values, first layer first."""
    forms = [constants.format for constants in layers.values()]
    return [[form.k_bits, form.v_bits] for form in forms]


def side_losses(
    model: Any, ids_BT: Tensor, layers: Mapping[int, KVConstants], *, sinks: int, seed: int = 0
) -> Losses:
    """What a model's loss feels of each layer's keys and values at each of ``CHOICES``.

    Args:
        model: A causal language model of transformers.
        ids_BT: int64 token ids of calibration windows; the first ``WINDOWS`` are run.
        layers: Constants of all layers, for any bits.
        sinks: First tokens that stay whole.
        seed: Of the draws.

    Raises:
        RotqError: see ``replaced_attention``, and a loss without a gradient, or a finite one.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {layer: torch.zeros(2, len(CHOICES), dtype=torch.float64) for layer in layers}
    ids_BT = ids_BT[:WINDOWS, :TOKENS]
    for ids_T in ids_BT:
        slopes = _slopes(model, ids_T, generator)

        def felt(call: AttentionCall, slopes: dict[int, Tensor] = slopes) -> Tensor:
            output, moved = _moved_outputs(call, layers[call.layer], sinks)
            slope_ZBHGTD = slopes[call.layer]
            for side, of_side in enumerate(moved):
                for choice, d_BHGTD in enumerate(of_side):
                    along_ZT = (slope_ZBHGTD * d_BHGTD).sum((1, 2, 3, 5)).cpu().double()
                    sums[call.layer][side, choice] += along_ZT.square().sum(1).mean()
            return output.flatten(1, 2).transpose(1, 2)

        with torch.inference_mode(), replaced_attention(model, felt):
            _logits(model, ids_T)
    scale = 1 / (2 * ids_BT.numel())
    found: Losses = {}
    for layer, sum_2C in sums.items():
        keys, values = (scale * sum_2C).tolist()
        found[layer] = (keys, values)
    return found


def _slopes(model: Any, ids_T: Tensor, generator: torch.Generator) -> dict[int, Tensor]:
    """(Z, 1, H, G, T, D) of each layer, at its attention's output."""
    outputs: dict[int, Tensor] = {}

    def watched(call: AttentionCall) -> Tensor:
        k, v = call.k_BKTD, call.v_BKTD
        q_BHGTD = call.q_BHTD.unflatten(1, (k.shape[1], -1)) * call.scale
        output = attend(q_BHGTD, k, v, visible(0, k.shape[2], call.window, k.device))
        outputs[call.layer] = output if output.requires_grad else output.requires_grad_()
        return outputs[call.layer].flatten(1, 2).transpose(1, 2)

    with torch.enable_grad(), replaced_attention(model, watched):
        log_p_TV = _logits(model, ids_T).float().log_softmax(-1)
        kept = list(outputs.values())
        drawn = []
        for draw in range(_DRAWS):
            z_T1 = torch.multinomial(log_p_TV.detach().exp().cpu(), 1, generator=generator)
            loss = -log_p_TV.gather(1, z_T1.to(log_p_TV.device)).sum()
            drawn.append(_gradients(loss, kept, retain_graph=draw + 1 < _DRAWS))
    slopes = [torch.stack(of_layer) for of_layer in zip(*drawn, strict=True)]
    if not all(bool(slope.isfinite().all()) for slope in slopes):
        raise RotqError("the gradient of the model's loss is not finite, so no bits can be chosen")
    return dict(zip(outputs, slopes, strict=True))


def _gradients(loss: Tensor, outputs: list[Tensor], *, retain_graph: bool) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(loss, outputs, retain_graph=retain_graph)
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        raise RotqError(f"bits by layer need gradients, which this model lacks: {line}") from error


def _logits(model: Any, ids_T: Tensor) -> Tensor:
    ids_1T = ids_T[None].to(embedding_device(model))
    logits_TV: Tensor = model(input_ids=ids_1T, use_cache=False).logits[0]
    return logits_TV


def _moved_outputs(
    call: AttentionCall, constants: KVConstants, sinks: int
) -> tuple[Tensor, list[list[Tensor]]]:
    """A layer's output (B, H, G, T, D), and how far the bits of keys and of values move it."""
    k_BHTD, v_BHTD = call.k_BKTD, call.v_BKTD
    B, H, T, _ = k_BHTD.shape
    q_BHGTD = call.q_BHTD.unflatten(1, (H, -1)) * call.scale
    visible_TT = visible(0, T, call.window, k_BHTD.device)
    position_BT = torch.arange(T, device=k_BHTD.device).expand(B, -1)
    output = attend(q_BHGTD, k_BHTD, v_BHTD, visible_TT)
    moved: list[list[Tensor]] = [[], []]
    for bits in CHOICES:
        codec = KVCodec(recoded(constants, bits, bits))
        hats = codec.fake_quantize(k_BHTD.cpu(), v_BHTD.cpu(), position_BT.cpu())
        k_hat, v_hat = (hat.to(k_BHTD.device) for hat in hats)
        k_hat[:, :, :sinks], v_hat[:, :, :sinks] = k_BHTD[:, :, :sinks], v_BHTD[:, :, :sinks]
        moved[0].append(attend(q_BHGTD, k_hat, v_BHTD, visible_TT) - output)
        moved[1].append(attend(q_BHGTD, k_BHTD, v_hat, visible_TT) - output)
    return output, moved
