"""Packed weights in vLLM against transformers on the same file."""

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_engines import ask, assert_equal_to_transformers, engine, prompts_of

from rotq.formats.activations import ActivationGrid

PROMPTS = prompts_of(3, 70, 150)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_widths(
    bits: int, group_size: int, symmetric: bool, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint(bits, group_size, symmetric=symmetric)
    with engine(path) as llm:
        answers = [answer for prompt in PROMPTS for answer in ask(llm, [prompt])]
    assert_equal_to_transformers(path, PROMPTS, answers)


def test_unpacked_once(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(3)
    with engine(path, additional_config={"rotq_linear": "once"}) as llm:
        assert_equal_to_transformers(path, PROMPTS, ask(llm, PROMPTS))


@pytest.mark.parametrize(
    ("block_size", "inputs"),
    [(None, None), (64, None), (None, ActivationGrid(bits=8, symmetric=True))],
    ids=str,
)
def test_the_rotq_format(
    block_size: int | None, inputs: ActivationGrid | None, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint(4, format="rotq", rotated=True, block_size=block_size, inputs=inputs)
    with engine(path) as llm:
        answers = ask(llm, PROMPTS, tokens=12 if inputs is None else 1)
    # inputs that are rounded flip by the last bits of sums
    assert_equal_to_transformers(path, PROMPTS, answers, near=1e-4 if inputs is None else 0.05)


def test_biases(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(5, family="llama-wide-biases")
    with engine(path) as llm:
        assert_equal_to_transformers(path, PROMPTS, ask(llm, PROMPTS))
