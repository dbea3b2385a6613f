"""Two processes on one machine against one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_engines import Answer, ask, engine, prompts_of

SUPPORT = Path(__file__).parents[2] / "support"
LENGTHS = [3, 70, 150]
KV = {"additional_config": {"rotq_kv": "k3v3"}, "block_size": 64}


def answers_of(model: Path, **options: Any) -> list[Answer]:
    """Of engines in other processes."""
    environment = os.environ | {"PYTHONPATH": str(SUPPORT)}
    command = [sys.executable, str(SUPPORT / "vllm_answers.py"), str(model)]
    command += [json.dumps(LENGTHS), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def assert_same(found: list[Answer], expected: list[Answer]) -> None:
    for (tokens, log_p), (wanted, wanted_log_p) in zip(found, expected, strict=True):
        assert tokens == wanted
        torch.testing.assert_close(
            torch.tensor(log_p), torch.tensor(wanted_log_p), rtol=0, atol=1e-4
        )


@pytest.mark.slow
def test_packed_weights_and_cache(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(3)
    with engine(path, **KV) as llm:
        expected = ask(llm, prompts_of(*LENGTHS))
    assert_same(answers_of(path, tensor_parallel_size=2, **KV), expected)


@pytest.mark.slow
def test_pipeline(checkpoint: Callable[..., Path]) -> None:
    """One sequence at a time; with more, or without a compiler's warm-up, vLLM itself fails."""
    path = checkpoint(3)
    with engine(path, **KV) as llm:
        expected = [ask(llm, [prompt])[0] for prompt in prompts_of(*LENGTHS)]
    options = {"pipeline_parallel_size": 2, "max_num_seqs": 1, **KV}
    options |= {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    assert_same(answers_of(path, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [None, 64], ids=["gathered", "blocks"])
def test_rotated_inputs(block_size: int | None, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(4, format="rotq", rotated=True, block_size=block_size)
    with engine(path) as llm:
        expected = ask(llm, prompts_of(*LENGTHS))
    assert_same(answers_of(path, tensor_parallel_size=2), expected)


@pytest.mark.slow
def test_parts_that_cannot_be_split(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(3, family="llama-uneven")
    with pytest.raises(
        AssertionError, match=r"down_proj: groups of 64 do not divide the 160 columns of a rank"
    ):
        answers_of(path, tensor_parallel_size=2)
