"""Positions that a model says it has are as many as it can be run at."""

from typing import Any

import pytest
import torch
import transformers
from tiny_models import CONFIGS, VOCAB, tiny_model

from rotq.formats.integer import Grid
from rotq.layers.packed_weight import PackedWeight
from rotq.layers.quant_embedding import QuantEmbedding
from rotq.models.limits import embedding_device, limits_of, vocabulary_of

POSITIONS = 12
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
GPT = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "decoder_layers": 1,
    "encoder_layers": 1,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "encoder_ffn_dim": 16,
    "max_position_embeddings": POSITIONS,
}
ESM = {**SMALL, "mask_token_id": 4, "position_embedding_type": "absolute"}

BOUNDED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT),
    "gpt-bigcode": ("GPTBigCodeConfig", GPT),
    "gpt-neo": (
        "GPTNeoConfig",
        {**SMALL, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
    ),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "codegen": ("CodeGenConfig", {**GPT, "n_head": 4, "rotary_dim": 4}),
    "openai-gpt": ("OpenAIGPTConfig", GPT),
    "ctrl": ("CTRLConfig", {**GPT, "dff": 16}),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCAB, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": POSITIONS},
    ),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "opt-projected": ("OPTConfig", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 8}),
    "biogpt": ("BioGptConfig", SMALL),
    "bart": ("BartConfig", SEQ2SEQ),
    "marian": ("MarianConfig", {**SEQ2SEQ, "pad_token_id": 0}),
    "prophetnet": (
        "ProphetNetConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_decoder_layers": 1,
            "num_encoder_layers": 1,
            "num_decoder_attention_heads": 2,
            "num_encoder_attention_heads": 2,
            "decoder_ffn_dim": 16,
            "encoder_ffn_dim": 16,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": 0,
        },
    ),
    "bert": ("BertConfig", SMALL),
    "ibert": ("IBertConfig", {**SMALL, "pad_token_id": 1}),
    "roberta": ("RobertaConfig", {**SMALL, "pad_token_id": 1}),
    "esm-absolute": ("EsmConfig", {**ESM, "pad_token_id": 1}),
    "esm-absolute-0": ("EsmConfig", ESM),
    "electra": ("ElectraConfig", {**SMALL, "embedding_size": 16}),
    "distilbert": ("DistilBertConfig", {**SMALL, "dim": 16, "hidden_dim": 16, "n_layers": 1}),
    "mpnet": ("MPNetConfig", {**SMALL, "pad_token_id": 1}),
    "nystromformer": (
        "NystromformerConfig",
        {**SMALL, "num_landmarks": 2, "segment_means_seq_len": 2},
    ),
}
MASKED = ("bert", "ibert", "roberta", "esm", "electra", "distilbert", "mpnet", "nystromformer")


def model_of(name: str) -> Any:
    config_class, options = BOUNDED[name]
    masked = name.startswith(MASKED)
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    return auto.from_config(getattr(transformers, config_class)(**options)).eval()


def runs(model: Any, length: int) -> bool:
    ids_BT = torch.randint(3, VOCAB, (1, length))
    try:
        with torch.no_grad():
            model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", BOUNDED)
def test_a_model_runs_at_its_positions_and_not_beyond(name: str) -> None:
    model = model_of(name)
    limits = limits_of(model)
    assert limits.embeddings == VOCAB
    assert limits.positions is not None
    assert runs(model, limits.positions)
    assert not runs(model, limits.positions + 1)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("gpt2", "bert")])
def test_rotary_models_have_no_bound(name: str) -> None:
    model = tiny_model(name, dtype=torch.float32)
    assert limits_of(model).positions is None
    assert runs(model, 70)


def test_a_packed_embedding_is_not_unpacked_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    table = model.get_input_embeddings()
    grid = Grid(bits=6, group_size=8, symmetric=True)
    model.set_input_embeddings(QuantEmbedding(table, grid))
    monkeypatch.delattr(PackedWeight, "weight")
    assert vocabulary_of(model) == limits_of(model).embeddings == len(table.weight)
    assert embedding_device(model) == torch.device("cpu")
