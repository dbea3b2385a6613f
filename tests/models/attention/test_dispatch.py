"""An attention's name, set on models and parts of them and put back."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from rotq.errors import RotqError
from rotq.models.attention import dispatch


def names(module: nn.Module) -> set[str]:
    return {m.config._attn_implementation for m in module.modules() if hasattr(m, "config")}


@pytest.mark.parametrize("part", ["", "model.layers.1", "model.layers.1.self_attn"])
def test_a_name_holds_inside_the_context(part: str) -> None:
    model = tiny_model("gemma3")
    with dispatch.used(model.get_submodule(part), "eager"):
        assert names(model.get_submodule(part)) == {"eager"}
    assert names(model) == {"sdpa"}


@pytest.mark.parametrize("part", ["", "model.layers.0"])
def test_each_configuration_gets_its_own_name_back(part: str) -> None:
    model = tiny_model("llama")
    module = model.get_submodule(part)
    other = type(model.config)(**model.config.to_dict())
    other._attn_implementation = "eager"
    module.extra = nn.Identity()
    module.extra.config = other
    with pytest.raises(RuntimeError, match="stop"), dispatch.used(module, "sdpa"):
        raise RuntimeError("stop")
    assert (model.config._attn_implementation, other._attn_implementation) == ("sdpa", "eager")


def test_an_unknown_name_is_refused_and_changes_nothing() -> None:
    model = tiny_model("llama")
    with pytest.raises(RotqError, match=r"LlamaForCausalLM: .*rotq_unheard_of"):
        dispatch.use(model, "rotq_unheard_of")
    with pytest.raises(RotqError), dispatch.used(model, "rotq_unheard_of"):
        pass
    assert names(model) == {"sdpa"}


def test_a_model_that_transformers_only_warns_about_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda _: False))
    with pytest.raises(RotqError, match="LlamaForCausalLM does not let its attention be set"):
        dispatch.use(model, "eager")


def test_what_is_registered_is_run() -> None:
    model = tiny_model("llama")
    seen, made = [], torch.zeros(1)

    def attention(module, query, key, value, mask, **_):
        seen.append(mask)
        return torch.zeros_like(query).transpose(1, 2), None

    dispatch.register("rotq_test", attention, mask=lambda *_, **__: made)
    with dispatch.used(model, "rotq_test"):
        model(torch.ones(1, 3, dtype=torch.int64), use_cache=False)
    assert len(seen) == 2
    assert all(mask is made for mask in seen)
