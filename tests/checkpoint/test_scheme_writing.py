"""The config that is written: what compressed-tensors writes, and what is read back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_name
from tiny_checkpoints import W3_CHANNEL, W4, W4_SYMMETRIC, W8

from rotq.checkpoint.scheme import read_scheme
from rotq.checkpoint.scheme_writing import quantization_config, transformers_obstacle
from rotq.errors import RotqError
from rotq.formats.activations import ActivationGrid
from rotq.formats.floats import float_grid
from rotq.formats.integer import Grid, PlainGrid
from rotq.formats.trellis import Trellis
from rotq.layers.online_heads import OnlineHeads

PLAIN = PlainGrid(bits=8, group_size=-1, symmetric=True)
BLOCKS = float_grid("fp8_block")
LAYERS = [f"model.layers.{i}.{leaf}" for i in range(3) for leaf in ("mlp.up_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    "grids", [[W4], [W4_SYMMETRIC], [W3_CHANNEL], [W4, W8], [PLAIN], [BLOCKS]], ids=str
)
def test_config_is_what_compressed_tensors_writes(grids: list[Grid]) -> None:
    layers = {name: grids[i % len(grids)] for i, name in enumerate(LAYERS)}
    ours = quantization_config(layers, ["lm_head"], "compressed-tensors")
    assert [group.grid for group in read_scheme(ours).groups] == grids
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


def test_layers_are_named_and_never_their_class() -> None:
    """A head that is put on the model is a Linear too."""
    config = quantization_config(dict.fromkeys(LAYERS, W4), ["lm_head"], "compressed-tensors")
    assert config["config_groups"].keys() == {"group_0"}
    assert config["config_groups"]["group_0"]["targets"] == [
        r"re:model\.layers\.\d+\.mlp\.up_proj$",
        r"re:model\.layers\.\d+\.mlp\.down_proj$",
    ]
    assert config["ignore"] == ["lm_head"]


@pytest.mark.parametrize("format", ["compressed-tensors", "rotq"])
@pytest.mark.parametrize("whole", [True, False], ids=["all blocks", "some layers"])
def test_names_are_matched_with_the_base_models_prefix_and_without(
    format: str, whole: bool
) -> None:
    layers = dict.fromkeys(LAYERS if whole else LAYERS[1:3], W4)
    others = [name for name in LAYERS if name not in layers]
    rotated = [name for name in layers if "down" in name and format == "rotq"]
    config = quantization_config(layers, [*others, "lm_head"], format, rotated, prefix="model")
    scheme = read_scheme(json.loads(json.dumps(config)))
    for name in layers:
        for other in (name, name.removeprefix("model.")):
            assert scheme.grid(other) == W4
            assert scheme.is_rotated(other) == (name in rotated)
            compressed = QuantizationConfig.model_validate(config).config_groups["group_0"]
            assert any(match_name(other, target) for target in compressed.targets)
    for name in (*others, "lm_head", "score", "pooler.dense", "tower.layers.0.mlp.up_proj"):
        assert scheme.grid(name) is None


def test_two_grids_by_kind_of_layer_and_by_name() -> None:
    layers = {name: W8 if "down" in name else W4 for name in LAYERS}
    groups = quantization_config(layers, [], "rotq")["config_groups"]
    assert groups["group_0"]["targets"] == [r"re:model\.layers\.\d+\.mlp\.up_proj$"]
    assert groups["group_1"]["targets"] == [r"re:model\.layers\.\d+\.mlp\.down_proj$"]
    layers[LAYERS[1]] = W4
    groups = quantization_config(layers, [], "rotq")["config_groups"]
    assert groups["group_1"]["targets"] == [LAYERS[3], LAYERS[5]]


@pytest.mark.parametrize(
    ("format", "rotates"), [("compressed-tensors", False), ("rotq", False), ("rotq", True)]
)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_scheme_reads_what_is_written(format: str, rotates: bool, number: int) -> None:
    grids = [W4, W8, W3_CHANNEL][:number]
    layers = {name: grids[i % number] for i, name in enumerate(LAYERS)}
    rotated = [name for name in LAYERS if "down" in name and rotates]
    config = quantization_config(layers, ["lm_head"], format, rotated)
    scheme = read_scheme(json.loads(json.dumps(config)))
    assert {name: scheme.grid(name) for name in LAYERS} == layers
    assert [name for name in [*LAYERS, "lm_head"] if scheme.is_rotated(name)] == rotated
    assert config["version"] == {"compressed-tensors": "0.20.0", "rotq": 1}[format]
    assert bool(config.get("online")) == rotates


def test_blocks_of_the_rotation_are_read_as_written() -> None:
    rotated = [name for name in LAYERS if "down" in name]
    for heads in (OnlineHeads(), OnlineHeads(rotated=True)):
        config = quantization_config(
            dict.fromkeys(LAYERS, W4), [], "rotq", rotated, block_size=16, heads=heads
        )
        assert config["version"] == 4
        scheme = read_scheme(json.loads(json.dumps(config)))
        assert scheme.heads == heads
        assert scheme.rotation_size(rotated[0], 48) == 16
        assert scheme.rotation_size(LAYERS[0], 48) is None
    whole = quantization_config(dict.fromkeys(LAYERS, W4), [], "rotq", rotated)
    assert read_scheme(whole).rotation_size(rotated[0], 48) == 48


def test_layers_that_are_called_otherwise_in_the_files_are_targets_by_both_names() -> None:
    ours = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in range(3)]

    def stored_name(name: str) -> str:
        return name.replace("mlp", "block_sparse_moe").replace("up_proj", "w3")

    config = quantization_config(
        dict.fromkeys(ours, W4), ["lm_head"], "rotq", ours, stored_name=stored_name, prefix="model"
    )
    pattern = r"re:(model\.)?layers\.\d+\.{}$"
    both = [
        pattern.format(r"mlp\.experts\.\d+\.up_proj"),
        pattern.format(r"block_sparse_moe\.experts\.\d+\.w3"),
    ]
    assert config["config_groups"]["group_0"]["targets"] == both
    assert config["online"] == {"hadamard": both}
    assert config["ignore"] == ["lm_head"]


def test_refusals() -> None:
    layers = {"a": W4}
    with pytest.raises(ValueError, match="format"):
        quantization_config(layers, [], "gptq")
    with pytest.raises(ValueError, match="not empty"):
        quantization_config({}, [], "rotq")
    with pytest.raises(ValueError, match="online"):
        quantization_config(layers, [], "compressed-tensors", ["a"])


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


def test_paths_are_read_back_and_are_of_the_rotq_format() -> None:
    paths = Trellis(bits=3, group_size=-1, state_bits=12)
    layers = dict.fromkeys(LAYERS, paths) | {LAYERS[0]: replace(paths, bits=2, group_size=16)}
    outer = {"model.embed_tokens": W8}
    config = json.loads(json.dumps(quantization_config(layers, [], "rotq", outer=outer)))
    scheme = read_scheme(config)
    assert {name: scheme.grid(name) for name in layers | outer} == layers | outer
    assert (config["version"], config["format"]) == (7, "trellis")
    with pytest.raises(ValueError, match="cannot be expressed in compressed-tensors"):
        quantization_config(layers, [], "compressed-tensors")
    config["config_groups"]["group_0"]["weights"]["code"] = "3inst"
    with pytest.raises(RotqError, match="code 3inst; rotq reads mul1"):
        read_scheme(config)
    config["config_groups"]["group_0"]["weights"] |= {"code": "mul1", "state_bits": 30}
    with pytest.raises(RotqError, match="state_bits must be 8 to 16, got 30"):
        read_scheme(config)
