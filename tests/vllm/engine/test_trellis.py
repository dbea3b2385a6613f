"""Weights on a trellis in vLLM against transformers on the same file."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoints import write_checkpoint
from vllm_engines import ask, assert_equal_to_transformers, engine, prompts_of

from rotq.formats.trellis import Trellis

PROMPTS = prompts_of(3, 70, 150)


def trellis(bits: int, state_bits: int, group_size: int = -1) -> Trellis:
    return Trellis(bits=bits, state_bits=state_bits, group_size=group_size)


@pytest.mark.parametrize(
    "grids",
    [
        (trellis(2, 12),),
        (trellis(3, 12, 64),),
        # layers in turn: parts of one fused layer have words of two widths
        (trellis(3, 8), trellis(5, 10)),
    ],
    ids=str,
)
@pytest.mark.parametrize("linear", ["tiles", "once"])
def test_tokens_are_those_of_transformers(
    grids: tuple[Trellis, ...], linear: str, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path, "llama-wide", grids=grids, format="rotq", rotated=True).path
    with engine(path, additional_config={"rotq_linear": linear}) as llm:
        answers = ask(llm, PROMPTS)
    assert_equal_to_transformers(path, PROMPTS, answers)


def test_biases(tmp_path: Path) -> None:
    grids = (trellis(4, 12),)
    path = write_checkpoint(tmp_path, "llama-wide-biases", grids=grids, format="rotq").path
    with engine(path) as llm:
        assert_equal_to_transformers(path, PROMPTS, ask(llm, PROMPTS))


def test_experts_are_refused(tmp_path: Path) -> None:
    grids = (trellis(3, 8),)
    path = write_checkpoint(tmp_path, "qwen3-moe-wide", grids=grids, format="rotq").path
    with pytest.raises(Exception, match="experts on a trellis are not run in vLLM"), engine(path):
        pass
