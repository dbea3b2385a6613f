"""Attention over a packed history as stepwise decoding sees it, on whole windows.

Every earlier token is decoded from its codes, except the sinks and the ``recent`` last ones; the
query's own token is exact, as it is when tokens are generated one by one.

    attention error of a layer = sum |o' - o|^2 / sum |o|^2, o' and o with the same inputs

Shape suffixes: B windows, T positions, Q queries of a chunk, S keys, N keys near the queries,
H KV heads, G query heads per KV head, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.calibration_file import KVCalibration
from rotq.kv.codec import KVCodec
from rotq.models.replaced_attention import AttentionCall, attend, probabilities, visible


class QuantizedHistory:
    """An attention that sees earlier tokens as the cache gives them back.

    Args:
        calibration: Of the model.
        chunk: Queries whose scores are held at a time.
    """

    def __init__(self, calibration: KVCalibration, *, chunk: int = 256) -> None:
        self.sinks, self.recent = calibration.sinks, calibration.recent
        self.codecs = {n: KVCodec(transform) for n, transform in calibration.layers.items()}
        self.chunk = chunk
        self.error_energy = dict.fromkeys(self.codecs, 0.0)
        self.energy = dict.fromkeys(self.codecs, 0.0)

    @property
    def attention_error(self) -> list[float]:
        """Relative squared error of each layer's output so far.

        Raises:
            RotqError: the model never called a layer's attention.
        """
        unseen = [layer for layer, energy in self.energy.items() if not energy]
        if unseen:
            raise RotqError(f"attention of layer {unseen[0]} did not run or gave zeros")
        return [self.error_energy[layer] / self.energy[layer] for layer in sorted(self.energy)]

    def __call__(self, call: AttentionCall) -> Tensor:
        """(B, T, H G, D)."""
        self._check(call)
        k_BHSD, v_BHSD = call.k_BKTD, call.v_BKTD
        q_BHGTD = call.q_BHTD.unflatten(1, (k_BHSD.shape[1], -1)) * call.scale
        B, T = k_BHSD.shape[0], k_BHSD.shape[2]
        position_BT = torch.arange(T, device=k_BHSD.device).expand(B, -1)
        coded = self.codecs[call.layer].fake_quantize(k_BHSD, v_BHSD, position_BT)
        for hat_BHSD, exact_BHSD in zip(coded, (k_BHSD, v_BHSD), strict=True):
            hat_BHSD[:, :, : self.sinks] = exact_BHSD[:, :, : self.sinks]
        outputs = []
        for first in range(0, T, self.chunk):
            q_BHGQD = q_BHGTD[..., first : first + self.chunk, :]
            visible_QS = visible(first, q_BHGQD.shape[3], call.window, k_BHSD.device)
            end = visible_QS.shape[1]
            exact = (k_BHSD[:, :, :end], v_BHSD[:, :, :end])
            hat = (coded[0][:, :, :end], coded[1][:, :, :end])
            outputs.append(mixed_attention(q_BHGQD, hat, exact, visible_QS, recent=self.recent))
            self._compare(call.layer, outputs[-1], attend(q_BHGQD, *exact, visible_QS))
        return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2)

    def _compare(self, layer: int, output: Tensor, exact: Tensor) -> None:
        self.error_energy[layer] += float((output - exact).double().square().sum())
        self.energy[layer] += float(exact.double().square().sum())

    def _check(self, call: AttentionCall) -> None:
        if call.layer not in self.codecs:
            raise RotqError(f"the calibration has no layer {call.layer}")
        wanted = self.codecs[call.layer].transform.key.mean_HD.shape
        found = (call.k_BKTD.shape[1], call.k_BKTD.shape[3])
        if found != tuple(wanted):
            raise RotqError(
                f"layer {call.layer} has {found[0]} KV heads of width {found[1]}, "
                f"the calibration {wanted[0]} of {wanted[1]}"
            )


def mixed_attention(
    q_BHGQD: Tensor,
    hat: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    visible_QS: Tensor,
    *,
    recent: int,
) -> Tensor:
    """As ``attend``, with a query's own key and value and the ``recent`` before it exact.

    Args:
        q_BHGQD: Scaled; the last query belongs to the last key.
        hat: Decoded keys and values, (B, H, S, D) each.
        exact: The same before coding.
        visible_QS: As ``visible`` gives it.
        recent: Keys before the query's own.
    """
    num_queries, num_keys = visible_QS.shape
    low = max(0, num_keys - num_queries - recent)
    near_QN = torch.ones_like(visible_QS[:, low:]).triu(num_keys - num_queries - low - recent)
    k_BHSD, v_BHSD = (side[:, :, None] for side in hat)
    k_BHND, v_BHND = (side[:, :, None, low:] for side in exact)
    score_BHGQS = q_BHGQD @ k_BHSD.mT
    near_BHGQN = score_BHGQS[..., low:]
    near_BHGQN.copy_(torch.where(near_QN, q_BHGQD @ k_BHND.mT, near_BHGQN))
    p_BHGQS = probabilities(score_BHGQS, visible_QS)
    return p_BHGQS @ v_BHSD + (p_BHGQS[..., low:] * near_QN) @ (v_BHND - v_BHSD[..., low:, :])
