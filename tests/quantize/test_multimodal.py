"""The text part of models that see is quantized; their own class loads it, towers as they were."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_families import byte_tokenizer
from tiny_multimodal import image_inputs, tiny_multimodal

import rotq
import rotq.quantize.publish
from rotq.checkpoint.load import load_model
from rotq.cli.main import main
from rotq.errors import RotqError
from rotq.layers.quant_linear import QuantLinear
from rotq.models.registry import adapter_for
from rotq.quantize.estimate import estimate
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import Recipe, load_recipe

FAMILIES = ("qwen3_vl", "mistral3", "gemma3", "idefics3", "qwen3_5")
"""With sections of positions and DeepStack; renamed when stored; norms behind the branches; a
decoder of another name, and a model that asks its tower where it is; a hybrid."""


@pytest.fixture(scope="module", params=FAMILIES)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name, folder with the model and a text, the model, and an image for it."""
    return made(request.param, tmp_path_factory.mktemp(request.param))


def made(name: str, folder: Path, **changes: Any) -> Any:
    model = tiny_multimodal(name, **changes)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The cat sat on the mat, and dogs ran over the hills. " * 20)
    return name, folder, model, image_inputs(model)


pytestmark = pytest.mark.usefixtures("reloaded_here")


def recipe_of(folder: Path, preset: str, **changes: Any) -> Recipe:
    small = {
        "calibration.source": str(folder / "text.txt"),
        "calibration.num_samples": 2,
        "calibration.seq_len": 32,
        "weights.group_size": 16,
        "weights.group_fallback": "auto",
    }
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe(Path("configs") / f"{preset}.yaml", {**small, **named})


def logits(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def beside(source: Path, model: Any) -> dict[str, Any]:
    """Stored tensors of the towers and projectors."""
    adapter = adapter_for(model)
    decoder = adapter.part.rpartition(".")[2]
    stored = load_file(source / "model.safetensors")
    found = {n: t for n, t in stored.items() if decoder not in n and "lm_head" not in n}
    assert len(found) == sum(adapter.is_beside(name) for name in model.state_dict())
    return found


@pytest.mark.parametrize("format", ["compressed-tensors", "rotq"])
def test_its_own_class_loads_it(seeing: Any, format: str, tmp_path: Path) -> None:
    _, folder, model, inputs = seeing
    recipe = recipe_of(folder, "gptq", weights__symmetric=True, output__format=format)
    report = quantize_model(folder / "model", recipe, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kept = beside(folder / "model", model)
    assert all(torch.equal(stored[key], tensor) for key, tensor in kept.items())
    assert any(n.startswith(f"{len(kept)} tensors beside the text") for n in report.notes)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    assert type(theirs) is type(model)
    found = logits(theirs, inputs)
    packed = rotq.load(tmp_path / "out")
    assert sum(isinstance(module, QuantLinear) for module in packed.modules()) == len(report.layers)
    assert not any(adapter_for(model).is_beside(layer.name) for layer in report.layers)
    dense = load_model(tmp_path / "out", packed=False)
    torch.testing.assert_close(found, logits(dense, inputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, logits(packed, inputs), rtol=1e-4, atol=1e-4)
    assert (found - logits(model, inputs)).abs().max() > 1e-3
    assert "from transformers import AutoModelForImageTextToText" in (
        (tmp_path / "out" / "README.md").read_text()
    )


def test_tuned_by_w3(seeing: Any, tmp_path: Path) -> None:
    _, folder, model, inputs = seeing
    recipe = recipe_of(folder, "w3", tuning__steps=2, tuning__seq_len=32)
    quantize_model(folder / "model", recipe, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kept = beside(folder / "model", model)
    assert all(torch.equal(stored[key], tensor) for key, tensor in kept.items())
    assert logits(rotq.load(tmp_path / "out"), inputs).isfinite().all()


@pytest.mark.parametrize("name", ["qwen3_vl", "mistral3"])
def test_a_turned_stream_turns_the_projector(name: str, tmp_path: Path) -> None:
    """At 8 bits the rotated model does with an image what the original does."""
    _, folder, model, inputs = made(name, tmp_path)
    eight = {"weights__bits": 8, "rotation__residual": "hadamard"}
    recipe = recipe_of(folder, "rtn", **eight)
    report = quantize_model(folder / "model", recipe, folder / "out")
    found, expected = logits(rotq.load(folder / "out"), inputs), logits(model, inputs)
    assert (found - expected).norm() < 0.05 * expected.norm()
    stored, kept = load_file(folder / "out" / "model.safetensors"), beside(folder / "model", model)
    changed = {key for key, tensor in kept.items() if not torch.equal(stored[key], tensor)}
    writers = re.compile(adapter_for(model).image_writers.replace(r"model\.", "(model\\.)?", 1))
    assert changed == {key for key in kept if writers.fullmatch(key)} != set()
    (note,) = (n for n in report.notes if "beside the text decoder" in n)
    assert note.endswith("which R1 turns")


def test_a_stream_that_cannot_be_turned_is_refused_by_the_dry_run_too(tmp_path: Path) -> None:
    _, folder, _, _ = made("gemma3", tmp_path)
    recipe = recipe_of(folder, "rtn", rotation__residual="hadamard")
    for run in (
        lambda: estimate(folder / "model", recipe),
        lambda: quantize_model(folder / "model", recipe, folder / "out"),
    ):
        with pytest.raises(RotqError, match=r"^rotation.residual=hadamard is not possible .*norm"):
            run()
    assert not (folder / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_tied_or_not_with_a_bare_configuration(tied: bool, tmp_path: Path) -> None:
    """No generation_config, architectures left out: the model type says the class."""
    _, folder, _, inputs = made("mistral3", tmp_path, tie_word_embeddings=tied)
    source = folder / "model"
    (source / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    recipe = recipe_of(folder, "rtn", rotation__residual="hadamard", output__format="rotq")
    quantize_model(source, recipe, folder / "out")
    assert logits(rotq.load(folder / "out"), inputs).isfinite().all()
    written = json.loads((folder / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


def test_the_commands(tmp_path: Path) -> None:
    _, folder, _, _ = made("qwen3_vl", tmp_path)
    quantize_model(folder / "model", recipe_of(folder, "rtn"), folder / "out")
    text = ["--text", str(folder / "text.txt"), "--seq-len", "32"]
    for command in (
        ["eval", "ppl", str(folder / "out"), *text, "--reference", str(folder / "model")],
        ["inspect", str(folder / "out"), "--verify"],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output


def test_a_tower_that_is_split_while_it_is_loaded(tmp_path: Path) -> None:
    """Its file has queries, keys and values in one tensor; so has what is saved again."""
    _, _, model, inputs = made("qianfan_ocr", tmp_path)
    quantize_model(tmp_path / "model", recipe_of(tmp_path, "rtn"), tmp_path / "out")
    source, found = (load_file(tmp_path / f / "model.safetensors") for f in ("model", "out"))
    split = [name for name in source if ".attn.qkv." in name]
    assert split
    assert all(torch.equal(source[name], found[name]) for name in split)
    packed = rotq.load(tmp_path / "out")
    tower, expected = packed.model.vision_tower, model.model.vision_tower.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in tower.state_dict().items())
    dense = rotq.load(tmp_path / "out", packed=False)
    torch.testing.assert_close(logits(packed, inputs), logits(dense, inputs))
    packed.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in found.items())


def test_a_class_that_initializes_the_experts_of_a_block(tmp_path: Path) -> None:
    """It looks for the fused tensors, which packed experts are not."""
    tiny_multimodal("qwen3_omni_moe_thinker").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 20)
    quantize_model(tmp_path / "model", recipe_of(tmp_path, "rtn"), tmp_path / "out")
    experts = rotq.load(tmp_path / "out").model.language_model.layers[0].mlp.experts
    assert isinstance(experts[0].gate_proj, QuantLinear)
