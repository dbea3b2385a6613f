"""A .gguf file becomes a dense checkpoint, once, in another process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, tiny_model

from rotq.checkpoint.gguf import STAMP, convert, find_gguf, read_once
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.checkpoint.opening import describe_source, open_source
from rotq.errors import RotqError
from rotq.quantize.pipeline import quantize_model
from rotq.recipe.reading import from_dict

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    layer = name.removesuffix(".weight").replace("model.layers.", "blk.")
    for ours, theirs in NAMES.items():
        layer = layer.replace(ours, theirs)
    return f"{layer}.weight"


def permuted(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """GGUF stores rotary pairs next to each other, transformers in two halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for leaf, number in heads.items():
        if leaf in name:
            N, K = tensor.shape
            return tensor.view(number, 2, N // number // 2, K).transpose(1, 2).reshape(N, K)
    return tensor


def write_gguf(path: Path, model: Any) -> None:
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", "t", "1", *(f"t{i}" for i in range(config.vocab_size - 5))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(gguf_name(name), permuted(name, tensor, config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def dense_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers 5.23 takes hidden_size / heads for the head size of a GGUF Llama."""
    monkeypatch.setitem(CONFIGS, "llama-gguf", ("LlamaConfig", {"head_dim": 12}))
    return tiny_model("llama-gguf", dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path, dense_model: Any) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    write_gguf(path / "tiny.gguf", dense_model)
    return path


def refuse(*_: object, **__: object) -> str:
    raise RotqError("converted again")


def test_conversion_is_exact_and_done_once(
    folder: Path, tmp_path: Path, dense_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = tmp_path / "dense"
    source = open_source(folder, gguf_dir=dense)
    size = (folder / "tiny.gguf").stat().st_size
    assert source.quantized_bytes == describe_source(folder).quantized_bytes == size
    assert open_source(dense).quantized_bytes == 0
    expected = dense_model.state_dict()
    assert source.names() == sorted(expected)
    assert all(torch.equal(source.load(name), tensor) for name, tensor in expected.items())
    assert source.dtype == torch.float32
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert source.tokenizer_files()
    # another conversion would need a new process
    monkeypatch.setattr("rotq.checkpoint.gguf.run_module", refuse)
    open_source(folder / "tiny.gguf", gguf_dir=dense)
    (dense / STAMP).write_text('{"sha256": "of another file"}')
    with pytest.raises(RotqError, match="converted again"):
        open_source(folder, gguf_dir=dense)
    assert (dense / "model.safetensors").is_file()


def test_a_damaged_conversion_is_made_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = convert(folder / "tiny.gguf", tmp_path / "dense")
    weights = bytearray((dense / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (dense / "model.safetensors").write_bytes(weights)
    monkeypatch.setattr("rotq.checkpoint.gguf.run_module", refuse)
    with pytest.raises(RotqError, match="converted again"):
        convert(folder / "tiny.gguf", dense)


@pytest.mark.parametrize("name", ["dense", "dense.partial"])
def test_a_folder_of_the_users_own_is_not_converted_into(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("rotq.checkpoint.gguf.run_module", refuse)
    mine = tmp_path / name / "mine"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(RotqError, match=f"{name} holds mine and is no conversion of rotq's"):
        convert(folder / "tiny.gguf", tmp_path / "dense")
    (tmp_path / name / STAMP).write_text('{"sha256": "x", "files": {}}')
    with pytest.raises(RotqError, match="holds mine, which rotq did not make"):
        convert(folder / "tiny.gguf", tmp_path / "dense")
    with pytest.raises(RotqError, match="holds the GGUF file"):
        convert(folder / "tiny.gguf", folder)
    assert mine.read_text() == "mine"
    assert [path.name for path in folder.iterdir()] == ["tiny.gguf"]


def test_a_conversion_that_was_killed_is_begun_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mark is there before the first file of it."""
    seen: list[str] = []

    def look(_: str, arguments: list[Path], **__: str) -> str:
        seen.extend(path.name for path in arguments[1].iterdir())
        return ""

    monkeypatch.setattr("rotq.checkpoint.gguf.run_module", look)
    (tmp_path / "dense.partial").mkdir()
    (tmp_path / "dense.partial" / STAMP).write_text('{"file": "tiny.gguf"}')
    (tmp_path / "dense.partial" / "model.safetensors").write_text("half")
    convert(folder / "tiny.gguf", tmp_path / "dense")
    assert seen == [STAMP]


def test_loading_directly(folder: Path, dense_model: Any) -> None:
    model = load_model(folder)
    ids_BT = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = dense_model(ids_BT).logits
        torch.testing.assert_close(model(ids_BT).logits, expected, rtol=1e-5, atol=1e-5)
    assert getattr(model.config, "quantization_config", None) is None
    assert load_tokenizer(folder).convert_ids_to_tokens(5) == "t0"


def test_a_broken_file_is_one_line_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    os.truncate(folder / "tiny.gguf", 1000)
    with pytest.raises(RotqError, match=r"converting tiny\.gguf failed: ") as caught:
        convert(folder / "tiny.gguf", tmp_path / "dense")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_which_file(folder: Path, tmp_path: Path) -> None:
    assert find_gguf(folder) == folder / "tiny.gguf"
    assert find_gguf(tmp_path) is None
    with pytest.raises(RotqError, match="no folder for that"):
        open_source(folder)
    (folder / "second.gguf").write_bytes(b"")
    with pytest.raises(RotqError, match=r"2 \.gguf files"):
        find_gguf(folder)
    (folder / "config.json").write_text("{}")
    assert find_gguf(folder) is None
    with pytest.raises(RotqError, match="is a file"):
        find_gguf(folder / "config.json")


def test_a_file_is_parsed_once_for_all_that_is_read_of_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Path] = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: Path) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    whole = load_model(folder).state_dict()
    assert len(parsed) == 1
    with read_once(tmp_path, folder):
        tokenizer = load_tokenizer(folder)
        inside = load_model(folder).state_dict()
        assert describe_source(folder / "tiny.gguf").config.vocab_size == tokenizer.vocab_size
    assert len(parsed) == 2
    assert gguf.GGUFReader is Counted
    assert all(torch.equal(inside[name], tensor) for name, tensor in whole.items())
    with read_once(tmp_path):  # holds no such file
        assert gguf.GGUFReader is Counted


def test_a_job_tells_where_the_dense_model_is(folder: Path, tmp_path: Path) -> None:
    """Scores from before the job need not parse the file again."""
    recipe = from_dict({"solver": {"method": "rtn"}, "weights": {"group_size": -1}})

    def told(dense: Path, is_new: bool) -> None:
        assert is_new
        raise RotqError(", ".join(sorted(path.name for path in dense.iterdir())))

    with pytest.raises(RotqError, match=r"config\.json.*model\.safetensors"):
        quantize_model(folder, recipe, tmp_path / "out", settled=told)
