"""Passes before a server takes requests, in which everything is compiled that a text can meet.

Triton compiles a kernel for seconds when it is first launched with constants, types and sizes of a
new kind. The passes of a server have few shapes (``model_runner``), so one of each is run: a
prompt's first pass and one after a history, with the logits of the last token and with all, and a
decode step, which is captured then where steps are (``captured_step``). They are of rows of
padding, which store nothing.
"""

from __future__ import annotations

import time

from rotq.kv.pool.pool import PAGE_SIZE, Row
from rotq.serve.engine.model_runner import ModelRunner

COMPILED = ("cuda",)
"""Devices whose kernels are compiled when they are first launched."""


def warm_up(runner: ModelRunner, longest: int) -> float | None:
    """Run a pass of each kind; seconds that it took, None where nothing has to be compiled.

    Args:
        runner: Of a pool that has been tried, so that its norms have settled.
        longest: Tokens that a sequence may have.
    """
    if runner.model.device.type not in COMPILED:
        return None
    begun = time.monotonic()
    # a history of a whole page, and of all that there may be
    for count in {0, min(longest - 1, runner.pool.sinks + PAGE_SIZE), longest - 1}:
        row = Row(pages=[0] * runner.pool.table_width, sink=-1, count=count)
        for all_logits in (False, True):
            runner.prefill([0], row, all_logits=all_logits)
    runner.decode([], [])
    return time.monotonic() - begun
