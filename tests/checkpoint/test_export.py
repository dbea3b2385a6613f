"""The config, the tensors and the files next to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from tiny_checkpoints import (
    W3_CHANNEL,
    W4,
    W4_SYMMETRIC,
    W8,
    Written,
    random_quantized,
    write_checkpoint,
)
from tiny_models import tiny_model

from rotq.checkpoint.export import packed_tensors, stored_scale_dtype, write_metadata
from rotq.checkpoint.scheme import quantization_config, read_scheme, transformers_obstacle
from rotq.checkpoint.source import open_source
from rotq.errors import RotqError
from rotq.formats.activations import ActivationGrid
from rotq.formats.integer import Grid
from rotq.layers.online_heads import OnlineHeads

LAYERS = [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("mlp.up_proj", "mlp.down_proj")]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_tensors_equal_compressed_tensors(bits: int, symmetric: bool, group_size: int) -> None:
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    quantized = random_quantized(20, 40, grid, torch.float32)
    ours = packed_tensors("", quantized)
    config = quantization_config({"a": grid}, [], "compressed-tensors")["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate(config)
    state = {"weight": quantized.dequantize(), "weight_scale": quantized.scale_NG}
    if quantized.zero_NG is not None:
        state["weight_zero_point"] = quantized.zero_NG
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    assert {name.removeprefix(".") for name in ours} == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[f".{name}"].dtype
        assert torch.equal(tensor, ours[f".{name}"]), name
    dense = PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    assert torch.equal(dense, quantized.dequantize())


def test_signs_are_stored() -> None:
    signs_K = torch.tensor([1, -1] * 20, dtype=torch.float64)
    tensors = packed_tensors("x", random_quantized(4, 40, W4), signs_K)
    assert tensors["x.input_signs"].dtype == torch.int8
    assert torch.equal(tensors["x.input_signs"].double(), signs_K)


@pytest.mark.parametrize("grids", [[W4], [W4_SYMMETRIC], [W3_CHANNEL], [W4, W8]], ids=str)
def test_config_is_what_compressed_tensors_writes(grids: list[Grid]) -> None:
    layers = {name: grids[i % len(grids)] for i, name in enumerate(LAYERS)}
    ours = quantization_config(layers, ["lm_head"], "compressed-tensors")
    written = QuantizationConfig.model_validate(ours).model_dump()
    for name, value in written.items():
        assert ours[name] == value, name
    assert set(ours) - set(written) <= {
        "version",
        "sparsity_config",
        "transform_config",
        "dequantize",
    }


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_inputs_are_what_compressed_tensors_writes(symmetric: bool) -> None:
    inputs = ActivationGrid(bits=8, symmetric=symmetric)
    layers = dict.fromkeys(LAYERS, W4_SYMMETRIC)
    ours = quantization_config(layers, ["lm_head"], "compressed-tensors", inputs=inputs)
    written = QuantizationConfig.model_validate(ours).model_dump()
    assert ours["config_groups"] == written["config_groups"]
    assert read_scheme(json.loads(json.dumps(ours))).groups[0].input_grid == inputs


def test_what_compressed_tensors_cannot_say_is_refused() -> None:
    inputs = ActivationGrid(bits=8, symmetric=True)
    with pytest.raises(ValueError, match="dropped where weights have zero points"):
        quantization_config({"a": W4}, [], "compressed-tensors", inputs=inputs)
    for heads in (OnlineHeads(grid=inputs), OnlineHeads(rotated=True)):
        with pytest.raises(ValueError, match="rounded heads cannot be expressed in compressed"):
            quantization_config({"a": W4_SYMMETRIC}, [], "compressed-tensors", heads=heads)


@pytest.mark.parametrize("grid", [None, ActivationGrid(bits=3, symmetric=True)], ids=str)
@pytest.mark.parametrize("rotated", [False, True])
def test_heads_are_read_as_written(grid: ActivationGrid | None, rotated: bool) -> None:
    heads = OnlineHeads(rotated=rotated, grid=grid)
    config = quantization_config(dict.fromkeys(LAYERS, W4), [], "rotq", heads=heads)
    assert config["version"] == (1 if heads == OnlineHeads() else 2)
    assert read_scheme(json.loads(json.dumps(config))).heads == heads


def test_one_grid_targets_linear() -> None:
    config = quantization_config(dict.fromkeys(LAYERS, W4), ["lm_head"], "compressed-tensors")
    assert config["config_groups"].keys() == {"group_0"}
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"]


def test_two_grids_by_kind_of_layer_and_by_name() -> None:
    layers = {name: W8 if "down" in name else W4 for name in LAYERS}
    groups = quantization_config(layers, [], "rotq")["config_groups"]
    assert groups["group_0"]["targets"] == [r"re:model\.layers\.\d+\.mlp\.up_proj$"]
    assert groups["group_1"]["targets"] == [r"re:model\.layers\.\d+\.mlp\.down_proj$"]
    layers[LAYERS[1]] = W4
    groups = quantization_config(layers, [], "rotq")["config_groups"]
    assert groups["group_1"]["targets"] == [LAYERS[3], LAYERS[5]]


def test_a_kept_layer_is_in_no_pattern() -> None:
    layers = {name: W8 if "down" in name else W4 for name in LAYERS[:-1]}
    scheme = read_scheme(quantization_config(layers, [LAYERS[-1], "lm_head"], "rotq"))
    assert scheme.grid(LAYERS[-1]) is None
    assert scheme.grid("lm_head") is None


@pytest.mark.parametrize(
    ("format", "kind"),
    [("compressed-tensors", None), ("rotq", "hadamard"), ("rotq", "butterfly")],
)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_scheme_reads_what_is_written(format: str, kind: str | None, number: int) -> None:
    grids = [W4, W8, W3_CHANNEL][:number]
    layers = {name: grids[i % number] for i, name in enumerate(LAYERS)}
    online = {name: kind for name in LAYERS if "down" in name} if kind else {}
    config = quantization_config(layers, ["lm_head"], format, online)
    scheme = read_scheme(json.loads(json.dumps(config)))
    assert {name: scheme.grid(name) for name in LAYERS} == layers
    found = {name: scheme.rotation(name) for name in [*LAYERS, "lm_head"]}
    assert {name: rotation for name, rotation in found.items() if rotation} == online
    assert config["version"] == {None: "0.20.0", "hadamard": 1, "butterfly": 3}[kind]


def test_full_names_win_over_patterns_over_linear() -> None:
    config = quantization_config(dict(zip(LAYERS, (W4, W8, W3_CHANNEL), strict=False)), [], "rotq")
    targets = (["Linear"], [r"re:.*up_proj"], [LAYERS[0]])
    for group, target in zip(config["config_groups"].values(), targets, strict=True):
        group["targets"] = target
    scheme = read_scheme(config)
    assert [scheme.grid(name) for name in LAYERS[:3]] == [W3_CHANNEL, W4, W8]


def test_refusals() -> None:
    layers = {"a": W4}
    with pytest.raises(ValueError, match="format"):
        quantization_config(layers, [], "gptq")
    with pytest.raises(ValueError, match="not empty"):
        quantization_config({}, [], "rotq")
    with pytest.raises(ValueError, match="online"):
        quantization_config(layers, [], "compressed-tensors", {"a": "hadamard"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"type": "float"}}, "float"),
        ({"weights": {"strategy": "block"}}, "per block"),
        ({"weights": {"actorder": "group"}}, "another order"),
        ({"weights": {"num_bits": 1}}, "bits must be 2 to 8"),
        ({"weights": {"group_size": None}}, "not valid"),
        ({"input_activations": {"num_bits": 8}}, "activations"),
    ],
)
def test_groups_that_rotq_cannot_run(change: dict[str, dict[str, object]], message: str) -> None:
    config = quantization_config({"a": W4}, [], "compressed-tensors")
    for key, value in change.items():
        group = config["config_groups"]["group_0"]
        group[key] = {**(group[key] or {}), **value}
    with pytest.raises(RotqError, match=message):
        read_scheme(config)


def test_obstacles() -> None:
    def obstacle(
        *grids: Grid, has_experts: bool = False, format: str = "compressed-tensors"
    ) -> bool:
        config = quantization_config(dict(zip(LAYERS, grids, strict=False)), [], format)
        return transformers_obstacle(config, has_experts=has_experts) is not None

    assert not obstacle(W4)
    assert not obstacle(W4_SYMMETRIC, W8)
    assert obstacle(W4, W3_CHANNEL)
    assert not obstacle(W4, W3_CHANNEL, format="rotq")
    assert not obstacle(W4_SYMMETRIC, has_experts=True)
    assert obstacle(W4, has_experts=True)
    assert obstacle(W4_SYMMETRIC, W8, has_experts=True)


@pytest.mark.parametrize(
    ("model", "grid", "format", "experts", "expected"),
    [
        ("bfloat16", W4, "compressed-tensors", False, "bfloat16"),
        ("bfloat16", W4_SYMMETRIC, "compressed-tensors", False, "bfloat16"),
        ("float16", W4, "compressed-tensors", False, "float16"),
        ("float32", W4, "compressed-tensors", False, "float32"),
        ("float32", W4_SYMMETRIC, "compressed-tensors", False, "float16"),
        ("float32", W4_SYMMETRIC, "compressed-tensors", True, "float32"),
        ("bfloat16", W4, "rotq", False, "float16"),
    ],
)
def test_scale_dtypes(model: str, grid: Grid, format: str, experts: bool, expected: str) -> None:
    got = stored_scale_dtype(
        torch.float16, getattr(torch, model), grid, format, has_experts=experts
    )
    assert got == getattr(torch, expected)


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write_checkpoint(tmp_path)


def test_files(written: Written) -> None:
    names = {path.name for path in written.path.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "rotq_provenance.json",
        "rotq_recipe.yaml",
    }
    assert yaml.safe_load((written.path / "rotq_recipe.yaml").read_text()) == {"name": "tiny"}
    assert json.loads((written.path / "rotq_provenance.json").read_text()) == {"seed": 0}


def test_card(written: Written) -> None:
    card = (written.path / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers",
        "tags": ["rotq", "compressed-tensors", "4-bit"],
    }
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "4 bits, asymmetric, one scale per 8 columns" in card
    assert "`lm_head`" in card
    assert "at run time" not in card


def test_untied_and_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("llama-tied", dtype=torch.float32).save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("not for the checkpoint")
    out = tmp_path / "out"
    out.mkdir()
    write_metadata(
        out,
        open_source(source),
        quantization=quantization_config(
            {"a": W4}, [], "rotq", heads=OnlineHeads(grid=ActivationGrid(bits=4, symmetric=True))
        ),
        recipe={},
        provenance={},
        dtype=torch.bfloat16,
        untied=True,
        base_model="someone/tiny",
    )
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").is_file()
    assert not (out / "notes.txt").exists()
    card = (out / "README.md").read_text()
    assert "base_model: someone/tiny\nbase_model_relation: quantized\n" in card
    assert "import rotq" in card
    assert "- at run time: keys and values 4 bits symmetric per head and token\n" in card
