"""What a configuration says that its model predicts, however it says it."""

from types import SimpleNamespace
from typing import Any

import pytest

from rotq.models.task import architectures, is_masked


@pytest.mark.parametrize("named", [None, [], "LlamaForCausalLM", [1, None], {"a": 1}, 3])
def test_what_are_no_names_are_no_architectures(named: Any) -> None:
    config = SimpleNamespace(architectures=named, model_type="llama")
    assert architectures(config) == ["LlamaForCausalLM"]
    assert not is_masked(config)


def test_names_are_taken_as_they_are() -> None:
    config = SimpleNamespace(architectures=["EsmForMaskedLM"], model_type="llama")
    assert architectures(config) == ["EsmForMaskedLM"]
    assert is_masked(config)
