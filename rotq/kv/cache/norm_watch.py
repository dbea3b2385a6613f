"""Whether norms that were stored did not fit: refused before anything attends to them.

On a GPU the answer is copied to the host when the device comes to it, and asked for before the next
pass: what a pass gives is read by then, and so nothing waits twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rotq.errors import RotqError
from rotq.kv.cache.encoded_layer import EncodedLayer


class NormWatch:
    """Of one cache."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def look(self, layers: Sequence[EncodedLayer]) -> None:
        """After a pass.

        Raises:
            RotqError: a norm did not fit; on a GPU, ``settle`` raises it.
        """
        flag = flag_of(layers)
        if flag is None:
            return
        if flag.device.type != "cuda":
            refuse(flag)
            return
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(flag.device))
        self._pending = host, copied

    def settle(self) -> None:
        """Before a pass.

        Raises:
            RotqError: a norm of the last pass did not fit.
        """
        if self._pending is not None:
            (host, copied), self._pending = self._pending, None
            copied.synchronize()
            refuse(host)

    def forget(self) -> None:
        """What was seen is of nobody."""
        self._pending = None


def flag_of(layers: Sequence[EncodedLayer]) -> Tensor | None:
    """bool (), on their device: whether a norm that was coded last did not fit; None without."""
    # layers that were coded together have one flag
    flags = list(
        {id(flag): flag for layer in layers if (flag := layer.outgrown) is not None}.values()
    )
    if len(flags) < 2:
        return flags[0] if flags else None
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


def refuse(flag: Tensor) -> None:
    """Wait for the answer.

    Raises:
        RotqError: a norm did not fit.
    """
    if bool(flag):
        raise RotqError(
            "a token's keys or values are not finite, or hundreds of times larger than the first "
            "ones that were packed, and than calibration has seen; the packed cache cannot hold "
            "their norms"
        )
