"""After the passes at a server's start no text meets a kernel that is not compiled."""

from collections import Counter

import pytest
import torch
from specializations import Variants
from stubbed_step import stubbed
from tiny_served import calibration_of, served_model

from rotq.kv.pool.packed import PackedPool
from rotq.kv.pool.pool import PAGE_SIZE, Row
from rotq.serve.engine import warm_up
from rotq.serve.engine.model_runner import ModelRunner

LONGEST = 600


def runner_of(chunk_pages: int = 1) -> ModelRunner:
    # long chunks in 16 bits go another way
    model = served_model(dtype=torch.bfloat16 if chunk_pages > 1 else torch.float32)
    calibration = calibration_of(model, "k3v3")
    pool = PackedPool(model, calibration, num_pages=12, num_sinks=2, table_width=12)
    return ModelRunner(model, pool, rows=2, chunk_pages=chunk_pages)


def text(runner: ModelRunner, length: int, *, all_logits: bool) -> None:
    """A prompt in passes, and two steps."""
    pages, start = list(range(-(-length // PAGE_SIZE) + 1)), 0
    while start < length:
        end = runner.pass_end(start, length)
        row = Row(pages=pages, sink=0, count=start, fresh=end - start)
        runner.prefill([3] * (end - start), row, all_logits=all_logits)
        start = end
    for count in (length, length + 1):
        runner.decode([3], [Row(pages=pages, sink=0, count=count, fresh=1)])


@torch.inference_mode()
@pytest.mark.parametrize("chunk_pages", [1, 5])
def test_no_text_meets_a_new_kernel(chunk_pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "COMPILED", ("cpu",))
    runner, variants = runner_of(chunk_pages), Variants()
    # as after the trial
    runner.prefill([3] * 9, Row(pages=[0], sink=0, fresh=9))
    with stubbed(Counter(), variants.note):
        assert warm_up.warm_up(runner, LONGEST) is not None
        ready = variants.counts()
        for length in (1, 3, 17, 64, 200, 590):
            text(runner, length, all_logits=length % 2 == 0)
    assert variants.counts() == ready
    steps = {"decode_kernel", "turn_kernel", "merge_kernel", "encode_kernel"}
    prompts = {"dequantize_kernel" if chunk_pages > 1 else "packed_kernel"}
    assert steps | prompts <= {*ready}


def test_a_cpu_has_nothing_to_compile() -> None:
    assert warm_up.warm_up(runner_of(), LONGEST) is None
