"""Attention over a packed history as stepwise decoding sees it, on whole windows.

Every earlier token is decoded from its codes, except the sinks and the ``recent`` last ones; the
query's own token is exact, as it is when tokens are generated one by one; or all tokens of its
pass, as where a text is run through a cache in chunks.

    attention error of a layer = sum |o' - o|^2 / sum |o|^2, o' and o with the same inputs

Shape suffixes: B windows, T positions, Q queries of a chunk, S keys, N keys near the queries,
H KV heads, G query heads per KV head, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotq.devices import double, has_double
from rotq.errors import RotqError
from rotq.kv.calibration.file import KVCalibration
from rotq.kv.codec import KVCodec
from rotq.models.attention.replaced import AttentionCall, attend, probabilities, visible

Coder = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values (B, H, T, D) at positions (B, T), as a cache gives them back."""


@dataclass(frozen=True, kw_only=True)
class KVScheme:
    """Something that codes keys and values: ours, or a peer's."""

    name: str
    coders: dict[int, Coder]
    """A coder for each layer that has keys and values, by its number."""
    sinks: int
    recent: int
    stored_bits: float
    """Bits per key or value element of a token that is not kept whole."""
    elements: int
    """Key and value elements of a token, all layers."""


def scheme_of(calibration: KVCalibration) -> KVScheme:
    """Our codec as a scheme, with the constants of a calibration."""
    elements, bits = 0, 0.0
    for constants in calibration.layers.values():
        form, num_heads = constants.format, constants.key.base_H.numel()
        stored = calibration.spec.billed_bits or form.bits_per_element
        elements += 2 * form.head_dim * num_heads
        bits += stored * 2 * form.head_dim * num_heads
    coders = {layer: _coder(calibration, layer) for layer in calibration.layers}
    return KVScheme(
        name=calibration.spec.name,
        coders=coders,
        sinks=calibration.sinks,
        recent=calibration.recent,
        stored_bits=bits / elements,
        elements=elements,
    )


def _coder(calibration: KVCalibration, layer: int) -> Coder:
    """Codes where keys and values are, or on the CPU where that has no fp64."""

    def code(k_BHTD: Tensor, v_BHTD: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        own = k_BHTD.device
        device = own if has_double(own) else torch.device("cpu")
        codec = KVCodec(calibration.on(device).layer(layer))
        k_hat_BHTD, v_hat_BHTD = codec.fake_quantize(
            k_BHTD.to(device), v_BHTD.to(device), position_BT.to(device)
        )
        return k_hat_BHTD.to(own), v_hat_BHTD.to(own)

    return code


class QuantizedHistory:
    """An attention that sees earlier tokens as the cache gives them back.

    Args:
        scheme: For the model.
        step: Tokens of a forward pass, which see each other whole; 1 is decoding.
        chunk: Queries whose scores are held at a time.
        compares: Whether the exact attention is computed as well, for ``attention_error``.
    """

    def __init__(
        self, scheme: KVScheme, *, step: int = 1, chunk: int = 256, compares: bool = True
    ) -> None:
        self.sinks, self.recent = scheme.sinks, scheme.recent
        self.coders, self.step = scheme.coders, step
        self.chunk, self.compares = chunk, compares
        self.error_energy = dict.fromkeys(self.coders, 0.0)
        self.energy = dict.fromkeys(self.coders, 0.0)
        self.calls = dict.fromkeys(self.coders, 0)

    @property
    def attention_error(self) -> list[float]:
        """Relative squared error of each layer's output so far; 0 where the output was zero.

        Raises:
            RotqError: the model never called a layer's attention, or nothing was compared.
        """
        unseen = [layer for layer, calls in self.calls.items() if not calls]
        if unseen:
            raise RotqError(f"attention of layer {unseen[0]} did not run")
        pairs = [(self.error_energy[layer], self.energy[layer]) for layer in sorted(self.energy)]
        return [error / energy if energy else 0.0 for error, energy in pairs]

    def __call__(self, call: AttentionCall) -> Tensor:
        """The attention's output, (B, T, H G, D)."""
        if call.layer not in self.coders:
            raise RotqError(f"{call.layer + 1} layers, and constants for {len(self.coders)}")
        k_BHSD, v_BHSD = call.k_BKTD, call.v_BKTD
        q_BHGTD = call.q_BHTD.unflatten(1, (k_BHSD.shape[1], -1)) * call.scale
        B, T = k_BHSD.shape[0], k_BHSD.shape[2]
        position_BT = torch.arange(T, device=k_BHSD.device).expand(B, -1)
        coded = self.coders[call.layer](k_BHSD, v_BHSD, position_BT)
        for hat_BHSD, exact_BHSD in zip(coded, (k_BHSD, v_BHSD), strict=True):
            hat_BHSD[:, :, : self.sinks] = exact_BHSD[:, :, : self.sinks]
        outputs = []
        for first in range(0, T, self.chunk):
            q_BHGQD = q_BHGTD[..., first : first + self.chunk, :]
            visible_QS = visible(first, q_BHGQD.shape[3], call.window, k_BHSD.device)
            end = visible_QS.shape[1]
            exact = (k_BHSD[:, :, :end], v_BHSD[:, :, :end])
            hat = (coded[0][:, :, :end], coded[1][:, :, :end])
            whole = {"recent": self.recent, "step": self.step}
            outputs.append(mixed_attention(q_BHGQD, hat, exact, visible_QS, **whole))
            if self.compares:
                self._compare(call.layer, outputs[-1], attend(q_BHGQD, *exact, visible_QS))
        return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2)

    def _compare(self, layer: int, output: Tensor, exact: Tensor) -> None:
        self.calls[layer] += 1
        self.error_energy[layer] += float(double(output - exact).square().sum())
        self.energy[layer] += float(double(exact).square().sum())


def mixed_attention(
    q_BHGQD: Tensor,
    hat: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    visible_QS: Tensor,
    *,
    recent: int,
    step: int = 1,
) -> Tensor:
    """As ``attend``, with the keys and values of a query's own pass, up to its own, exact.

    So are the ``recent`` before them. A pass has ``step`` tokens, the first one begins at key 0.

    Args:
        q_BHGQD: Scaled; the last query belongs to the last key.
        hat: Decoded keys and values, (B, H, S, D) each.
        exact: The same before coding.
        visible_QS: As ``visible`` gives it.
        recent: Keys before the pass.
        step: Tokens of a pass.
    """
    num_queries, num_keys = visible_QS.shape
    position_Q = torch.arange(num_keys - num_queries, num_keys, device=visible_QS.device)
    start_Q = position_Q // step * step - recent
    low = max(0, int(start_Q[0]))
    near_QN = torch.arange(low, num_keys, device=visible_QS.device) >= start_Q[:, None]
    k_BHSD, v_BHSD = (side[:, :, None] for side in hat)
    k_BHND, v_BHND = (side[:, :, None, low:] for side in exact)
    score_BHGQS = q_BHGQD @ k_BHSD.mT
    near_BHGQN = score_BHGQS[..., low:]
    near_BHGQN.copy_(torch.where(near_QN, q_BHGQD @ k_BHND.mT, near_BHGQN))
    p_BHGQS = probabilities(score_BHGQS, visible_QS)
    return p_BHGQS @ v_BHSD + (p_BHGQS[..., low:] * near_QN) @ (v_BHND - v_BHSD[..., low:, :])
