"""Every family through the whole pipeline: same function rotated, same logits reloaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from numbered_words import write_model
from tiny_models import CONFIGS, POST_NORMS
from torch import Tensor

import rotq.quantize.pipeline
import rotq.quantize.publish
import rotq.quantize.setup
from rotq.checkpoint.files import read_json
from rotq.checkpoint.load import load_model
from rotq.errors import CheckFailed, RotqError, Stopped
from rotq.fusion import fuse
from rotq.layers.online_heads import UNTOUCHED
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import load_recipe
from rotq.report import JobReport

DATA = {"calibration.num_samples": 3, "calibration.seq_len": 24, "calibration.batch_size": 2}
STRONG = {
    "weights.bits": 3,
    "weights.group_size": 16,
    "weights.group_fallback": "auto",
    "solver.target_correction": 0.5,
    "solver.refine_sweeps": 1,
    "rotation.value": "hadamard",
    "importance.strategy": "attention",
}


@pytest.fixture(autouse=True)
def _reload_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process takes seconds; it is tested in tests/checkpoint/test_reload.py."""

    def check(folder: Path, ids_BT: Tensor, logits_BTV: Tensor, **_: Any) -> None:
        with torch.no_grad():
            actual_BTV = load_model(folder)(ids_BT, use_cache=False).logits
        if not torch.equal(actual_BTV, logits_BTV):
            raise CheckFailed(f"differs by {(actual_BTV - logits_BTV).abs().max():.2e}")

    monkeypatch.setattr(rotq.quantize.publish, "check_reload", check)


pytestmark = pytest.mark.usefixtures("numbered_words")


def make_jais2(folder: Path) -> Path:
    """A family that rotq has no adapter for."""
    write_model("llama", folder)
    config = transformers.Jais2Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.Jais2ForCausalLM(config).save_pretrained(folder)
    return folder


def run(model: Path, output: Path, **changes: Any) -> JobReport:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    values = {**DATA, "calibration.source": str(model / "text.txt"), **dotted}
    return quantize_model(model, load_recipe(None, values), output)


@pytest.mark.parametrize("name", CONFIGS)
def test_family_rotated_and_reloaded(name: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path / "model")
    residual = "none" if name in POST_NORMS else "hadamard"
    format = "rotq" if name == "gpt2" else "compressed-tensors"
    more = {"rotation.residual": residual, "output.format": format}
    report = run(model, tmp_path / "out", **STRONG, **more)
    assert report.rotation["largest_relative_difference"] < 1e-11
    linears = [module for module in report.layers if module.bits == 3]
    assert len(linears) == len(report.layers) > 0
    assert all(0 < layer.relative_error < 0.5 for layer in report.layers)
    config = read_json(tmp_path / "out" / "config.json")
    assert config.get("tie_word_embeddings", True) is (name in POST_NORMS)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["llama-biases", "gemma3", "qwen3-moe-mixed"])
def test_online_rotation_in_the_rotq_format(name: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path / "model")
    down = {"rotation.down": "hadamard", "output.format": "rotq"}
    report = run(model, tmp_path / "out", **STRONG, **down)
    assert report.rotation["largest_relative_difference"] < 1e-11


A4KV4 = {
    "rotation.down": "hadamard",
    "rotation.attention": "hadamard",
    "activations.bits": 4,
    "kv_cache.bits": 4,
    "output.format": "rotq",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_rounded_at_run_time_and_reloaded(name: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path / "model")
    report = run(model, tmp_path / "out", **STRONG, **A4KV4)
    assert report.rotation["largest_relative_difference"] < 1e-11
    config = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    rounding = {"dynamic": True, "num_bits": 4, "strategy": "token", "symmetric": False}
    rounding |= {"group_size": None, "type": "int"}
    assert config["attention"] == {"rotation": "hadamard", "kv_cache": rounding}
    assert {g["input_activations"]["num_bits"] for g in config["config_groups"].values()} == {4}
    loaded = load_model(tmp_path / "out")
    ids_BT = torch.arange(1, 25)[None]
    rounded_BTV = loaded(ids_BT, use_cache=False).logits
    for module in loaded.modules():
        if hasattr(module, "online_heads"):
            module.online_heads = UNTOUCHED
    assert (loaded(ids_BT, use_cache=False).logits - rounded_BTV).abs().max() > 1e-2


def test_w8a8_in_compressed_tensors(tmp_path: Path) -> None:
    """Not packed, since that is how engines that round activations read it."""
    model = write_model("qwen3", tmp_path / "model")
    grids = {"weights.symmetric": True, "weights.bits": 8, "activations.bits": 8}
    grids |= {"weights.group_size": -1}
    run(model, tmp_path / "out", **grids, activations__symmetric=True, rotation__value="hadamard")
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["format"] == (
        "int-quantized"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours = load_model(tmp_path / "out")
    ids_BT = torch.arange(1, 25)[None]
    assert torch.equal(theirs(ids_BT).logits, ours(ids_BT).logits)


def test_flatness_is_reported_where_it_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotq.evaluation.flatness.SAMPLED_TOKENS", 60)
    model = write_model("llama", tmp_path / "model")
    more = {"weights.group_size": 16}
    report = run(model, tmp_path / "rotated", **more, rotation__residual="hadamard")
    assert list(report.flatness) == [
        f"model.layers.{index}.{site}"
        for index in (0, 1)
        for site in ("qkv", "o", "gate_up", "down")
    ]
    qkv = report.flatness["model.layers.1.qkv"]
    assert qkv["after"]["spread"] < qkv["before"]["spread"]
    assert qkv["after"]["log_qsur"] > qkv["before"]["log_qsur"]
    assert report.flatness["model.layers.1.down"]["before"]["log_qsur"] is None
    assert JobReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert not run(model, tmp_path / "plain", **more).flatness


@pytest.mark.parametrize("name", ["llama", "qwen3-moe-mixed"])
def test_solver_and_tuning_see_rounded_inputs(name: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path / "model")
    more = {**STRONG, "tuning.steps": 2, "output.format": "rotq"}
    plain = run(model, tmp_path / "plain", **more)
    rounded = run(model, tmp_path / "rounded", **more, activations__bits=3)
    assert plain.layers[0].loss != rounded.layers[0].loss
    assert rounded.tuning["kl_first_quarter"] > 1.2 * plain.tuning["kl_first_quarter"]


def test_stopped_job_with_rounding_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model("llama", tmp_path / "model")
    run(model, tmp_path / "whole", **STRONG, **A4KV4)
    save_block, saved = rotq.quantize.pipeline.save_block, []

    def stop_after_the_first(*arguments: Any) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(1)
        save_block(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rotq.quantize.pipeline, "save_block", stop_after_the_first)
        with pytest.raises(Stopped):
            run(model, tmp_path / "out", **STRONG, **A4KV4)
    with pytest.raises(RotqError, match="a job with another recipe"):
        run(model, tmp_path / "out", **STRONG, **{**A4KV4, "kv_cache.bits": 3})
    run(model, tmp_path / "out", **STRONG, **A4KV4)
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out")]
    assert weights[0] == weights[1]


def test_heads_of_an_unknown_family_are_refused(tmp_path: Path) -> None:
    model = make_jais2(tmp_path / "model")
    values = {"weights__group_size": 16, "output__format": "rotq"}
    with pytest.raises(RotqError, match=r"Jais2ForCausalLM.*models\.md.*kv_cache\.bits=16"):
        run(model, tmp_path / "out", **values, kv_cache__bits=4)


def test_heads_without_a_hadamard_are_refused(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    config = read_json(model / "config.json") | {"head_dim": 18}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(RotqError, match=r"rotation\.attention=hadamard: .*order 18.*=none"):
        run(model, tmp_path / "out", rotation__attention="hadamard", output__format="rotq")


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_fewer_passes_and_offload(passes: int, offload: bool, tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    more = {"solver.passes": passes, "calibration.offload": offload}
    report = run(model, tmp_path / "out", **STRONG, **more)
    assert all(0 < layer.relative_error < 0.5 for layer in report.layers)


def test_offload_changes_nothing(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    for name, offload in (("memory", False), ("file", True)):
        run(model, tmp_path / name, **STRONG, calibration__offload=offload)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "file")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "strategy",
    [
        "first_n",
        "token_frequency",
        "activation_norm",
        "activation_difference",
        "token_similarity",
        "gradient",
    ],
)
def test_importance_strategies_change_the_result(strategy: str, tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    report = run(model, tmp_path / "out", importance__strategy=strategy, weights__group_size=16)
    plain = run(model, tmp_path / "plain", weights__group_size=16)
    assert all(0.2 < share < 0.999 for share in report.importance.values())
    assert set(plain.importance.values()) == {1.0}
    assert [layer.loss for layer in report.layers] != [layer.loss for layer in plain.layers]


def test_mixed_precision_and_kept_layers(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    rules = [{"match": r"layers\.0\.mlp", "bits": 8}, {"match": "o_proj", "keep": True}]
    report = run(
        model, tmp_path / "out", weights__group_size=16, weights__overrides=rules, weights__bits=3
    )
    bits = {layer.name: layer.bits for layer in report.layers}
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert bits["model.layers.1.mlp.down_proj"] == 3
    assert not any("o_proj" in name for name in bits)


def test_unknown_family_without_rotation_only(tmp_path: Path) -> None:
    model = make_jais2(tmp_path / "model")
    with pytest.raises(RotqError, match=r"Jais2ForCausalLM.*models\.md.*rotation\.residual=none"):
        run(model, tmp_path / "out", rotation__residual="hadamard", weights__group_size=16)
    report = run(model, tmp_path / "out", weights__group_size=16)
    assert len(report.layers) == 12


def test_a_wrong_rotation_stops_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model("llama", tmp_path / "model")
    monkeypatch.setattr(fuse.LinearMap, "on_rows", lambda self, weight_NK: weight_NK)
    with pytest.raises(CheckFailed, match=r"function of model\.layers\.0"):
        run(model, tmp_path / "out", **STRONG, rotation__residual="hadamard")
    assert not (tmp_path / "out").exists()


def test_what_transformers_alone_cannot_load_is_noted(tmp_path: Path) -> None:
    """Several grids with zero points, and the rotq format; one symmetric grid it can."""
    model = write_model("llama", tmp_path / "model")
    one = {"solver__method": "rtn", "weights__group_size": 16, "weights__symmetric": True}
    several = {**one, "weights__symmetric": False, "weights__group_fallback": "auto"}
    several["weights__overrides"] = [{"match": "q_proj", "bits": 3}]
    cases = {
        "one": (one, []),
        "several": (several, ["cannot load this checkpoint without rotq: it does not read zero"]),
        "rotq": ({**one, "output__format": "rotq"}, ["where rotq is installed, and nowhere else"]),
    }
    for name, (changes, wanted) in cases.items():
        notes = [
            note for note in run(model, tmp_path / name, **changes).notes if "transfor" in note
        ]
        assert len(notes) == len(wanted)
        assert all(words in note for words, note in zip(wanted, notes, strict=True))


MIXED = {"weights.average_bits": 2.9, "weights.scale_dtype": "bfloat16"}


@pytest.mark.parametrize("format", ["rotq", "compressed-tensors"])
@pytest.mark.parametrize("name", ["llama-biases", "gemma3", "qwen3-moe-mixed"])
def test_mixed_bits_keep_to_their_average(name: str, format: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path / "model")
    more = {"output.format": format, "weights.symmetric": format != "rotq"}
    if format != "rotq":
        more["weights.average_bits"] = 4.0  # scales are stored in fp32 beside experts
    report = run(model, tmp_path / "out", **MIXED | more)
    average = {**MIXED, **more}["weights.average_bits"]
    assert average - 0.3 < report.bits_per_weight <= average
    assert report.mixed["average_bits"] == average
    assert report.mixed["predicted_kl"] > 0
    assert len({layer.bits for layer in report.layers}) > 1
    grids = {layer.name: (layer.bits, layer.group_size) for layer in report.layers}
    for name in grids:
        if name.endswith("q_proj"):
            assert grids[name] == grids[name.replace("q_proj", "v_proj")]
        if name.endswith("gate_proj"):
            assert grids[name] == grids[name.replace("gate_proj", "up_proj")]
    assert not [note for note in report.notes if "its siblings have several grids" in note]


def test_transformers_loads_mixed_bits_where_grids_are_symmetric(tmp_path: Path) -> None:
    model = write_model("llama", tmp_path / "model")
    report = run(model, tmp_path / "out", **MIXED, weights__symmetric=True)
    assert len({layer.bits for layer in report.layers}) > 1
    assert not [note for note in report.notes if "transformers cannot" in note]
    ids_BT = torch.arange(1, 25)[None]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(ids_BT).logits, load_model(tmp_path / "out")(ids_BT).logits)


def test_a_stopped_job_of_mixed_bits_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model("llama", tmp_path / "model")
    mixed = {**MIXED, "output.format": "rotq", "tuning.steps": 1, "importance.strategy": "gradient"}
    run(model, tmp_path / "whole", **mixed)
    save_block, saved = rotq.quantize.pipeline.save_block, []

    def stop_after_the_first(*arguments: Any) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(save_block(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(rotq.quantize.pipeline, "save_block", stop_after_the_first)
        with pytest.raises(Stopped):
            run(model, tmp_path / "out", **mixed)
    monkeypatch.setattr(rotq.quantize.pipeline.GradientPass, "_forward", None)
    run(model, tmp_path / "out", **mixed)
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out")]
    assert weights[0] == weights[1]
