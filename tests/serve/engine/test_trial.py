"""A model is tried before it is served: what would be answered wrongly is refused."""

from typing import Any

import pytest
import torch
from tiny_served import calibration_of, served_model
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, EsmConfig, EsmForMaskedLM

from rotq.errors import RotqError
from rotq.kv.pool.attention import Extras
from rotq.serve.engine.build import build_engine
from rotq.serve.settings import Settings

LIMITS = Settings(kv_memory=1 << 20, max_batch=2)


def bert(model_class: Any, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, intermediate_size=48, **sizes, **changes)
    torch.manual_seed(0)
    return model_class(config).eval()


def esm() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = EsmConfig(
        vocab_size=33,
        intermediate_size=48,
        pad_token_id=1,
        mask_token_id=32,
        position_embedding_type="rotary",
        **sizes,
    )
    torch.manual_seed(0)
    return EsmForMaskedLM(config).eval()


@pytest.mark.parametrize("kv", ["k3v3", "dense"])
@pytest.mark.parametrize(
    "make",
    [
        esm,
        lambda: bert(BertForMaskedLM),
        # its class is a causal one, and its configuration is not
        lambda: bert(BertLMHeadModel),
    ],
    ids=["esm", "bert", "bert-no-decoder"],
)
def test_what_sees_tokens_to_come_is_refused(make: Any, kv: str) -> None:
    model = make()
    with pytest.raises(RotqError, match=r"sees tokens to come|causal"):
        build_engine(model, calibration_of(model, kv), LIMITS)


@pytest.mark.parametrize("kv", ["k3v3", "dense"])
def test_another_result_is_refused(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here because values count double in the pool's attention, and not in the model's own."""
    name = "rotq.kv.pool.attention.packed" if kv != "dense" else ""
    model = served_model()
    if name:
        import rotq.kv.pool.attention as attention

        packed = attention.packed

        def doubled(*args: Any, **kwargs: Any) -> Any:
            out, weights = packed(*args, **kwargs)
            return 2 * out, weights

        monkeypatch.setattr(name, doubled)
    else:
        attend = Extras.attend
        monkeypatch.setattr(Extras, "attend", lambda *args: 2 * attend(*args))
    with pytest.raises(RotqError, match="computes something else"):
        build_engine(model, calibration_of(model, kv), LIMITS)


def test_what_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(Extras, "attend", failing)
    with pytest.raises(RotqError, match=r"llama: no cache .* a pass with one fails .*: two lines"):
        build_engine(served_model(), None, LIMITS)


def test_logits_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Extras.attend
    monkeypatch.setattr(Extras, "attend", lambda *args: float("nan") * attend(*args))
    with pytest.raises(RotqError, match="not finite"):
        build_engine(served_model(), None, LIMITS)


@pytest.mark.parametrize("kv", ["k3v3", "dense"])
def test_other_heads_than_the_configuration_says_are_refused(kv: str) -> None:
    model = served_model()
    model.config.num_key_value_heads = 1
    with pytest.raises(RotqError, match=r"llama: by its configuration a layer has 1 KV heads"):
        build_engine(model, calibration_of(model, kv), LIMITS)


@pytest.mark.parametrize("kv", ["k3v3", "dense"])
def test_it_is_tried_on_tokens_that_have_embeddings(kv: str) -> None:
    model = served_model()
    model.config.vocab_size = 10**6
    assert build_engine(model, calibration_of(model, kv), LIMITS).longest == 640


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv", ["k3v3", "k8v3", "dense"])
def test_16_bits_are_served(kv: str, dtype: torch.dtype) -> None:
    model = served_model(dtype=dtype)
    assert build_engine(model, calibration_of(model, kv), LIMITS).longest == 640


def test_the_shortest_context_is_served() -> None:
    for longest in (1, 2, 9):
        limits = Settings(kv_memory=1 << 20, max_batch=2, max_length=longest)
        assert build_engine(served_model(), None, limits).longest == longest
