"""``rotq export``: what GGUF and GPTQ files hold, read by other packages or by their definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from numbered_words import VOCAB, write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rotq.quantize.publish
import rotq.quantize.setup
from rotq.checkpoint.gptq_writing import gptq_tensors
from rotq.checkpoint.load import load_model
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.source import read_tensor
from rotq.cli.main import main
from rotq.formats.gguf_blocks import TYPES, blocks, obstacle, type_for
from rotq.formats.integer import Grid, Quantized
from rotq.layers.quant_linear import QuantLinear
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import load_recipe

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
RTN = {
    "solver.method": "rtn",
    "solver.scale_search": "minmax",
    "weights.group_size": 32,
    "calibration.num_samples": 2,
    "calibration.seq_len": 16,
}
TYPE_OF = {
    "q4_0": {"weights.symmetric": True},
    "q4_1": {},
    "q8_0": {"weights.bits": 6, "weights.symmetric": True},
    "mxfp4": {"weights.format": "mxfp4", "weights.symmetric": True},
}


def byte_pairs() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 3]
    vocabulary = {token: number for number, token in enumerate([*alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{{ messages }}"
    return fast


def quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str = "llama", **changes: Any
) -> Path:
    """A job without its last check, of which tests/checkpoint/test_reload.py is."""
    monkeypatch.setattr(rotq.quantize.publish, "check_reload", lambda *_, **__: None)
    model = write_model(name, tmp_path / "model", **WIDE)
    byte_pairs().save_pretrained(model)
    monkeypatch.setattr(rotq.quantize.setup, "load_tokenizer", lambda *_, **__: byte_pairs())
    (tmp_path / "text.txt").write_text("ab cab bag " * 60)
    recipe = load_recipe(None, {**RTN, "calibration.source": str(tmp_path / "text.txt"), **changes})
    quantize_model(model, recipe, tmp_path / "out")
    return tmp_path / "out"


def export(checkpoint: Path, output: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["export", str(checkpoint), "-o", str(output), *options])


def ids() -> Tensor:
    return torch.randint(1, VOCAB - 3, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", TYPE_OF)
def test_a_type_holds_what_codes_stand_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads the file by its own names, order of rows and unpacking."""
    pytest.importorskip("gguf")
    out = quantized(tmp_path, monkeypatch, **TYPE_OF[kind])
    result = export(out, tmp_path / "g", "--format", "gguf", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["types"][kind] == 14
    assert facts["largest_change"] < (1e-3 if kind == "q4_1" else 1e-7)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "g", gguf_file="g.gguf", dtype=torch.float32
    )
    ours = load_model(out, packed=False, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids()).logits, ours(ids()).logits, atol=2e-2 if kind == "q4_1" else 1e-3, rtol=0
        )


def test_tokenizer_and_template_are_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    out = quantized(tmp_path, monkeypatch, "qwen2", **{"weights.symmetric": True})
    assert export(out, tmp_path / "g", "--format", "gguf").exit_code == 0
    fields = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "g" / "g.gguf").fields.items()}
    assert fields["general.architecture"] == "qwen2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.merges"] == ["a b"]
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert len(fields["tokenizer.ggml.tokens"]) == VOCAB
    assert fields["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB - 1}]"
    end = fields["tokenizer.ggml.eos_token_id"]
    assert fields["tokenizer.ggml.tokens"][end] == "<end>"
    assert fields["tokenizer.ggml.token_type"][end] == gguf.TokenType.CONTROL


def test_what_a_type_does_not_hold_is_refused_with_the_one_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quantized(tmp_path, monkeypatch)
    result = export(out, tmp_path / "g", "--format", "gguf", "--type", "q4_0")
    assert result.exit_code == 1
    assert "q4_0 does not hold model.layers.0.self_attn.q_proj" in result.stderr
    assert "it has no zero points; q4_1 does" in result.stderr
    assert not (tmp_path / "g").exists()


def test_what_happens_at_run_time_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"weights.symmetric": True, "activations.bits": 8}
    out = quantized(tmp_path, monkeypatch, **changes)
    for kind in ("gguf", "gptq"):
        result = export(out, tmp_path / "g", "--format", kind)
        assert result.exit_code == 1
        assert "quantize with activations.bits=16" in result.stderr


def test_other_families_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quantized(tmp_path, monkeypatch, "gemma3", **{"weights.symmetric": True})
    for kind in ("gguf", "gptq"):
        result = export(out, tmp_path / "g", "--format", kind)
        assert result.exit_code == 1
        assert "gemma3_text is not exported to" in result.stderr


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    result = export(model, tmp_path / "g", "--format", "gguf")
    assert result.exit_code == 1
    assert "is not quantized" in result.stderr


@pytest.mark.parametrize(
    ("grid", "wanted"),
    [
        (Grid(bits=4, group_size=32, symmetric=True), "q4_0"),
        (Grid(bits=3, group_size=64, symmetric=True), "q4_0"),
        (Grid(bits=2, group_size=-1, symmetric=False), "q4_1"),
        (Grid(bits=5, group_size=64, symmetric=False), "q8_0"),
        (Grid(bits=8, group_size=64, symmetric=True), "q8_0"),
        (Grid(bits=8, group_size=64, symmetric=False), "bf16"),
        (Grid(bits=4, group_size=16, symmetric=True), "bf16"),
    ],
    ids=str,
)
def test_the_smallest_type_that_holds_a_grid_is_taken(grid: Grid, wanted: str) -> None:
    assert type_for(grid, 64) == wanted


def random_quantized(grid: Grid) -> Quantized:
    generator = torch.Generator().manual_seed(0)
    N, K = 32, 64
    G = K // grid.columns_per_group(K)
    zero_NG = torch.randint(grid.q_min + 1, grid.q_max + 1, (N, G), generator=generator)
    return Quantized(
        q_NK=torch.randint(grid.q_min, grid.q_max + 1, (N, K), generator=generator).to(torch.int8),
        scale_NG=(torch.rand(N, G, generator=generator) + 0.1).to(torch.float16),
        zero_NG=None if grid.symmetric else zero_NG.to(torch.int8),
        grid=grid,
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", TYPES[:3])
def test_blocks_are_what_the_package_gguf_reads(kind: str, bits: int, symmetric: bool) -> None:
    gguf = pytest.importorskip("gguf")
    quantized = random_quantized(Grid(bits=bits, group_size=32, symmetric=symmetric))
    if obstacle(kind, quantized.grid, 64) is not None:
        pytest.skip("it does not hold this grid")
    found = gguf.dequantize(blocks(quantized, kind), gguf.GGMLQuantizationType[kind.upper()])
    exact = kind != "q4_1"
    torch.testing.assert_close(
        torch.from_numpy(found), quantized.dequantize(), rtol=0, atol=0 if exact else 8e-3
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_gptq_tensors_by_definition(bits: int, symmetric: bool, offset: int) -> None:
    """One bitstream, the first element in the lowest bits of the first word."""
    quantized = random_quantized(Grid(bits=bits, group_size=32, symmetric=symmetric))
    tensors = gptq_tensors(quantized, offset)
    q_KN = bitstream(tensors["qweight"].T, bits).T
    zero_GN = (bitstream(tensors["qzeros"], bits) + offset) % 2**bits
    group_K = tensors["g_idx"].long()
    weight_KN = (q_KN - zero_GN[group_K]) * tensors["scales"].float()[group_K]
    assert torch.equal(weight_KN.T, quantized.dequantize())


def bitstream(words: Tensor, bits: int) -> Tensor:
    """(rows, elements) of (rows, words)."""
    single = (words.to(torch.int64)[..., None] >> torch.arange(32)) & 1
    return (single.flatten(1).unflatten(1, (-1, bits)) << torch.arange(bits)).sum(-1)


def test_a_gptq_folder_has_all_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"weights.overrides": [{"match": "layers.0.mlp.up_proj", "keep": True}]}
    out = quantized(tmp_path, monkeypatch, "llama-biases", **changes)
    assert export(out, tmp_path / "g", "--format", "gptq").exit_code == 0
    config = json.loads((tmp_path / "g" / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {r"-:^model\.layers\.0\.mlp\.up_proj$": {}}
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, False)
    entries = read_entries(tmp_path / "g" / "model.safetensors")
    tensors = {entry.name: read_tensor(entry) for entry in entries}
    model = load_model(out)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert tensors[f"{name}.qweight"].shape == (
                module.in_features // 8,
                module.out_features,
            )
            assert f"{name}.bias" in tensors
    assert "model.layers.0.mlp.up_proj.weight" in tensors
    assert (tmp_path / "g" / "tokenizer.json").is_file()
    version = "gptq" if all_zeros_above_0(model) else "gptq_v2"
    assert config["checkpoint_format"] == version


def all_zeros_above_0(model: Any) -> bool:
    layers = [m.quantized() for m in model.modules() if isinstance(m, QuantLinear)]
    return all(bool((q.zero_NG != q.grid.q_min).all()) for q in layers if q.zero_NG is not None)


def test_gptq_refuses_what_it_has_no_place_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quantized(tmp_path, monkeypatch, **TYPE_OF["mxfp4"])
    result = export(out, tmp_path / "g", "--format", "gptq")
    assert result.exit_code == 1
    assert "GPTQ holds integers of 2, 3, 4, 8 bits" in result.stderr
