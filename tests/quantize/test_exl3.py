"""Jobs whose output is EXL3: written, read back, resumed, mixed, and refused by name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from numbered_words import word_tokenizer, write_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import rotq.quantize.setup
from rotq.checkpoint.inspection import read_checkpoint
from rotq.checkpoint.load import load_model
from rotq.cli.main import main
from rotq.errors import RotqError, Stopped
from rotq.formats.exl3 import TiledWeight
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import Recipe, load_recipe
from rotq.report import JobReport, Progress
from rotq.report.lines import quantization_line

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="without numba the search takes minutes"
)

PRESET = Path(__file__).parents[2] / "configs" / "exl3.yaml"
SMALL = {"calibration.num_samples": 3, "calibration.seq_len": 24}


@pytest.fixture(autouse=True)
def _words(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = word_tokenizer()
    monkeypatch.setattr(rotq.quantize.setup, "load_tokenizer", lambda *_, **__: fast)


def recipe(model: Path, **changes: object) -> Recipe:
    return load_recipe(PRESET, {**SMALL, "calibration.source": str(model / "text.txt"), **changes})


def run(model: Path, output: Path, **changes: object) -> JobReport:
    return quantize_model(model, recipe(model, **changes), output)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A padded model at 3 bits, with one layer at 5 and one kept; the job's reload check ran."""
    folder = tmp_path_factory.mktemp("exl3")
    model = write_model("llama-tied", folder / "model", dtype=torch.bfloat16)
    overrides = [
        {"match": r"layers\.0\.mlp\.up_proj", "bits": 5},
        {"match": r"layers\.1\.mlp\.down_proj", "keep": True},
    ]
    with pytest.MonkeyPatch.context() as patch:
        fast = word_tokenizer()
        patch.setattr(rotq.quantize.setup, "load_tokenizer", lambda *_, **__: fast)
        run(model, folder / "out", **{"weights.overrides": overrides})
    fast.save_pretrained(folder / "out")
    return folder / "out"


def test_the_file_is_laid_out_as_exllamav3_has_it(made: Path) -> None:
    tensors = load_file(made / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"  # 80 x 48, both padded to 128
    found = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if name in key}
    assert {key: (t.dtype, tuple(t.shape)) for key, t in found.items()} == {
        "trellis": (torch.int16, (8, 8, 80)),
        "suh": (torch.float16, (128,)),
        "svh": (torch.float16, (128,)),
        "mul1": (torch.int32, ()),
    }
    assert found["mul1"].item() & 0xFFFFFFFF == 0x83DCD12D
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (48, 80)
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" not in tensors


def test_both_configurations_are_there(made: Path) -> None:
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "exl3"
    assert config["codebook"] == "mul1"
    assert config["head_bits"] == 16
    assert 3.0 < config["bits"] < 3.4
    stored = json.loads((made / "quantization_config.json").read_text())
    assert stored.items() >= config.items()
    layer = stored["tensor_storage"]["model.layers.0.mlp.up_proj"]
    assert layer["bits_per_weight"] == 5
    trellis = layer["stored_tensors"]["model.layers.0.mlp.up_proj.trellis"]
    assert trellis == {
        "shape": [8, 8, 80],
        "n_bytes": 2 * 8 * 8 * 80,
        "dtype": "torch.int16",
        "torch_dtype": "int16",
    }
    assert "model.layers.1.mlp.down_proj" not in stored["tensor_storage"]
    theirs = json.loads((made / "quantize_config.json").read_text())
    assert theirs["format"] == "exl3"
    assert "version" not in theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_tensors_whatever_the_dtype(
    made: Path, dtype: torch.dtype
) -> None:
    """Scales are read as they are stored: in bf16 they would be others."""
    tensors = load_file(made / "model.safetensors")
    model = load_model(made, dtype=dtype)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    assert type(layer) is nn.Linear
    tiled = TiledWeight(
        shape=(64, 48),
        trellis_IJW=tensors[f"{name}.trellis"],
        suh_k=tensors[f"{name}.suh"],
        svh_n=tensors[f"{name}.svh"],
    )
    assert torch.equal(layer.weight, tiled.dequantize(dtype))


def test_it_is_close_to_the_original(made: Path) -> None:
    original = load_model(made.parent / "model", dtype=torch.float32)
    own = load_model(made, dtype=torch.float32)
    for name, module in own.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            weight_NK = original.get_submodule(name).weight
            missed = (module.weight - weight_NK).square().mean() / weight_NK.square().mean()
            assert missed < (1e-6 if name.endswith("1.mlp.down_proj") else 0.1), name


def test_transformers_loads_it_and_saves_it_dense(made: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ids = torch.arange(1, 20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(
        load_model(made, dtype="float32", packed=False)(ids).logits, again(ids).logits
    )


def test_it_is_inspected_and_measured(made: Path) -> None:
    found = read_checkpoint(made)
    assert quantization_line(found.quantization).startswith("exl3, 3.")
    assert "tiles of 16 x 16" in (made / "README.md").read_text()
    asked = ["eval", "ppl", str(made), "--windows", "2", "--seq-len", "16", "--json"]
    text = ["--text", str(made.parent / "model" / "text.txt"), "--reference"]
    done = CliRunner().invoke(main, [*asked, *text, str(made.parent / "model")])
    assert done.exit_code == 0, done.output
    assert 0 < json.loads(done.stdout)["kl"] < 0.2


def test_biases_are_stored_as_exllamav3_wants_them(tmp_path: Path) -> None:
    """The reload check of the job compares logits bit by bit."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 32}
    source = write_model("qwen2", tmp_path / "model", dtype=torch.bfloat16, **sizes)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.bias"
    tensors[name] = torch.linspace(-1e-6, 1e-6, 128).bfloat16()  # not all are numbers of fp16
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    run(source, tmp_path / "out")
    stored_N = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert stored_N.dtype == torch.float16
    assert torch.equal(stored_N, tensors[name].half())
    bias_N = load_model(tmp_path / "out", dtype="float32").get_parameter(name)
    assert torch.equal(bias_N, stored_N.float())


def test_a_stopped_job_continues_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    class Stop(Progress):
        def block_done(self, index: int, *_: object) -> None:
            if index == 0:
                raise KeyboardInterrupt

    model, text = made.parent / "model", {"weights.bits": 2}
    run(model, tmp_path / "whole", **text)
    with pytest.raises(Stopped):
        quantize_model(model, recipe(model, **text), tmp_path / "out", progress=Stop())
    run(model, tmp_path / "out", **text)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_file_with_another_code_is_read_by_its_mark(made: Path, tmp_path: Path) -> None:
    """As exllamav3 wrote them before 1.0, with mcg, and before that, with none."""
    tensors, name = load_file(made / "model.safetensors"), "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.mcg"] = tensors.pop(f"{name}.mul1")
    del tensors["model.layers.0.self_attn.k_proj.mul1"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((made / "config.json").read_text())
    attention = load_model(tmp_path, dtype="float32").model.layers[0].self_attn
    for layer, rows, code in ((attention.q_proj, 64, "mcg"), (attention.k_proj, 32, "3inst")):
        path = "model.layers.0.self_attn." + ("q_proj" if code == "mcg" else "k_proj")
        tiled = TiledWeight(
            shape=(rows, 48),
            trellis_IJW=tensors[f"{path}.trellis"],
            suh_k=tensors[f"{path}.suh"],
            svh_n=tensors[f"{path}.svh"],
            code=code,
        )
        assert torch.equal(layer.weight, tiled.dequantize())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q_proj.suh": None}, "q_proj is in tiles, but the checkpoint has no suh for it"),
        ({"q_proj.suh": torch.ones(64).half()}, r"suh: the checkpoint has shape \[64\]"),
        (
            {"q_proj.trellis": torch.zeros(8, 8, 56, dtype=torch.int16)},
            r"trellis has shape \[8, 8, 56\]; rotq reads 1 to 8 whole bits",
        ),
        ({"other_proj.trellis": torch.zeros(1)}, "belongs to no linear layer"),
    ],
    ids=str,
)
def test_damaged_files_are_refused(
    changed: dict[str, torch.Tensor | None], message: str, made: Path, tmp_path: Path
) -> None:
    tensors = load_file(made / "model.safetensors")
    for key, tensor in changed.items():
        name = f"model.layers.0.self_attn.{key}"
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((made / "config.json").read_text())
    with pytest.raises(RotqError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights.state_bits": 12}, "output.format=exl3 needs weights.state_bits=16, got 12"),
        ({"weights.group_size": 64}, "output.format=exl3 needs weights.group_size=-1, got 64"),
        ({"weights.head": 6}, "output.format=exl3 needs weights.head=16, got 6"),
        ({"tuning.steps": 5}, "output.format=exl3 needs tuning.steps=0, got 5"),
        ({"rotation.down": "hadamard"}, "rotation.down is applied at run time"),
        ({"solver.rounder": "scalar"}, "output.format=exl3 needs solver.rounder=trellis"),
        ({"output.format": "compressed-tensors"}, "needs output.format=rotq, or exl3"),
        ({"solver.method": "rtn"}, "solver.rounder=trellis needs solver.method=gptq"),
    ],
    ids=str,
)
def test_recipes_that_the_format_has_no_place_for(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, **changes)


def test_another_trellis_preset_is_told_which_one_to_take() -> None:
    with pytest.raises(ValueError, match="state_bits=16, got 12; -c exl3 has all of it"):
        load_recipe(PRESET.with_name("t3.yaml"), {"output.format": "exl3"})


def test_other_families_and_biases_to_pad_are_refused_before_the_work(tmp_path: Path) -> None:
    gemma = write_model("gemma3", tmp_path / "gemma")
    with pytest.raises(ValueError, match="exl3 is for llama, mistral, qwen2, qwen3, not gemma3"):
        run(gemma, tmp_path / "out")
    qwen = write_model("qwen2", tmp_path / "qwen")
    with pytest.raises(ValueError, match=r"has a bias for .* no multiple of 128"):
        run(qwen, tmp_path / "out")
    assert not (tmp_path / "out").exists()
