"""Patterns of layers that vLLM calls otherwise."""

import pytest

from rotq.vllm.targets import in_vllm

LFM2 = {".conv.": ".short_conv.", "expert_bias": None}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (r"re:layers\.\d+\.conv\.in_proj$", r"re:layers\.\d+\.short_conv\.in_proj$"),
        (r"re:layers\.\d+\.convolution\.in_proj$", r"re:layers\.\d+\.convolution\.in_proj$"),
        ("layers.0.conv.in_proj", "layers.0.conv.in_proj"),
        ("Linear", "Linear"),
        (r"re:.*expert_bias$", r"re:.*expert_bias$"),
    ],
)
def test_patterns_are_exchanged_and_nothing_else(target: str, expected: str) -> None:
    assert in_vllm(target, LFM2) == expected
