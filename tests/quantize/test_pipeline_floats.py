"""Whole jobs whose weights, and activations, are floats of 4 or 8 bits."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_words import VOCAB, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from rotq.checkpoint.load import load_model
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.source import read_tensor
from rotq.formats.float_inputs import float_inputs
from rotq.layers.quant_linear import QuantLinear
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import load_recipe
from rotq.report import JobReport

SMALL = {
    "calibration.num_samples": 3,
    "calibration.seq_len": 24,
    "calibration.batch_size": 2,
    "weights.symmetric": True,
    "solver.target_correction": 0.5,
    "solver.refine_sweeps": 1,
}
KINDS = {
    "nvfp4": {"weights.format": "nvfp4", "weights.group_size": 16},
    "mxfp4": {"weights.format": "mxfp4", "weights.group_size": 32},
    "fp8": {"weights.format": "fp8", "weights.bits": 8, "weights.group_size": -1},
}
FORMATS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "fp8": "float-quantized",
}
ROUNDED = {"activations.bits": 4, "activations.symmetric": True}
BLOCKS = {
    "weights.format": "fp8_block",
    "weights.bits": 8,
    "weights.group_size": 128,
    "solver.method": "rtn",
    "solver.scale_search": "minmax",
}
WIDE = {"hidden_size": 64, "intermediate_size": 96}

pytestmark = pytest.mark.usefixtures("reloaded_here", "numbered_words")


def run(kind: str, tmp_path: Path, dtype: str = "auto", **changes: Any) -> tuple[Path, JobReport]:
    model = write_model("llama", tmp_path / "model", **WIDE)
    source = {"calibration.source": str(model / "text.txt")}
    recipe = load_recipe(None, {**SMALL, **KINDS[kind], **source, **changes})
    return tmp_path / "out", quantize_model(model, recipe, tmp_path / "out", dtype=dtype)


def stored(path: Path) -> dict[str, Tensor]:
    return {entry.name: read_tensor(entry) for entry in read_entries(path / "model.safetensors")}


def ids() -> Tensor:
    return torch.randint(1, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_tensors_unpacks_the_weights_that_rotq_runs(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    compressors = importlib.import_module("compressed_tensors.compressors")
    schemes = importlib.import_module("compressed_tensors.quantization")
    out, report = run(kind, tmp_path, dtype="bfloat16")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == FORMATS[kind]
    tensors = stored(out)
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    layers = {n: m for n, m in load_model(out).named_modules() if isinstance(m, QuantLinear)}
    assert len(layers) == len(report.layers) == 14
    (group,) = config["config_groups"].values()
    scheme = schemes.QuantizationScheme(**group)
    for name, layer in layers.items():
        parts = {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(name)}
        dense_NK = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(dense_NK, layer.dequantize(torch.bfloat16)), name


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_alone_computes_the_same_logits(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    out, _ = run(kind, tmp_path, dtype="bfloat16")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(ids()).logits
        ours = load_model(out, packed=False)(ids()).logits
    assert torch.equal(theirs, ours)


def test_blocks_of_fp8_are_computed_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit in fp32, activations in groups of 128."""
    pytest.importorskip("compressed_tensors")
    monkeypatch.setitem(KINDS, "fp8_block", BLOCKS)
    for size in ("hidden_size", "intermediate_size"):
        monkeypatch.setitem(WIDE, size, 128)
    monkeypatch.setitem(WIDE, "head_dim", 32)
    out, _ = run("fp8_block", tmp_path, **{**ROUNDED, "activations.bits": 8})
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(ids()).logits
        model = load_model(out)
        assert torch.equal(theirs, model(ids()).logits)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.input_grid == float_inputs("fp8_block")


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_transformers_rounds_activations_as_rotq_does(kind: str, tmp_path: Path) -> None:
    """Not bit by bit: it finds their scales in bfloat16, and some go to a neighbour."""
    pytest.importorskip("compressed_tensors")
    out, report = run(kind, tmp_path, dtype="bfloat16", **ROUNDED)
    assert any("scales of activations" in note for note in report.notes)
    theirs = first_queries(AutoModelForCausalLM.from_pretrained(out))
    model = load_model(out)
    ours = first_queries(model)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.input_grid = None
    unrounded = first_queries(model)
    assert (theirs - ours).norm() < 0.6 * (unrounded - ours).norm()
    assert (theirs - unrounded).norm() > 0.8 * (unrounded - ours).norm()


def first_queries(model: Any) -> Tensor:
    """What the first layer puts out."""
    seen: list[Tensor] = []
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    hook = layer.register_forward_hook(lambda _, __, output: seen.append(output.float()))
    with torch.no_grad():
        model(ids())
    hook.remove()
    return seen[0]


def test_layers_that_engines_fuse_share_their_global_scales(tmp_path: Path) -> None:
    out, _ = run("nvfp4", tmp_path, **ROUNDED)
    tensors = stored(out)
    for which in ("weight_global_scale", "input_global_scale"):
        for site in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            of_site = {
                tensor.item()
                for name, tensor in tensors.items()
                if name.endswith(which) and name.split(".")[-2] in site and ".0." in name
            }
            assert len(of_site) == 1


def test_ranges_of_inputs_are_those_of_the_calibration_text(tmp_path: Path) -> None:
    """The first layer reads what no rounding came before."""
    out, _ = run("nvfp4", tmp_path, **ROUNDED)
    seen: list[float] = []
    dense = load_model(tmp_path / "model", dtype=torch.bfloat16)
    dense.get_submodule("model.layers.0.self_attn.q_proj").register_forward_pre_hook(
        lambda _, args: seen.append(args[0].abs().max().item())
    )
    words = (tmp_path / "model" / "text.txt").read_text().split()
    with torch.no_grad():
        dense(torch.tensor([[int(word[1:]) for word in words]]))
    scale = stored(out)["model.layers.0.self_attn.q_proj.input_global_scale"].item()
    # the scale is rounded to bf16, and the job computes in fp32 where the CPU has no other products
    assert 1 - 2**-7 <= scale / (448 * 6 / seen[0]) < 3


def test_tuning_trains_gains_and_keeps_scales(tmp_path: Path) -> None:
    out, _ = run("nvfp4", tmp_path / "a", **ROUNDED)
    tuned, _ = run(
        "nvfp4", tmp_path / "b", **ROUNDED, **{"tuning.steps": 2, "tuning.learning_rate": 0.05}
    )
    before, after = stored(out), stored(tuned)
    changed = {name for name in before if not same(before[name], after[name])}
    assert changed
    assert all("norm" in name for name in changed)


def same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def test_a_dtype_that_its_loaders_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set --dtype bfloat16 or output"):
        run("nvfp4", tmp_path, dtype="float32")


def test_the_rotq_format_runs_floats_in_any_dtype(tmp_path: Path) -> None:
    """Here with every layer's input rotated in blocks of the group."""
    inputs = {"rotation.inputs": "hadamard", "rotation.block_size": 16}
    changes = {"output.format": "rotq", **inputs, **ROUNDED}
    out, report = run("nvfp4", tmp_path, dtype="float32", **changes)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["version"] == 8
    assert report.rotation["inputs"] == "hadamard 16 in blocks"
    assert report.rotation["largest_relative_difference"] < 1e-11
    model = load_model(out)
    assert model.dtype == torch.float32
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert all(layer.input_signs is not None and len(layer.input_signs) == 16 for layer in layers)
    same = {"model.norm.weight", "model.layers.1.input_layernorm.weight"}
    dense = load_model(tmp_path / "model").state_dict()
    assert all(torch.equal(model.state_dict()[name], dense[name]) for name in same)


def test_columns_that_groups_do_not_divide_are_refused(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    recipe = load_recipe(None, {**SMALL, **KINDS["mxfp4"]})
    with pytest.raises(ValueError, match="groups of 32, which mxfp4 has, do not divide 48"):
        quantize_model(model, recipe, tmp_path / "out")
