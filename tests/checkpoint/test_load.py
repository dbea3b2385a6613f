"""What is exported comes back: through rotq, through transformers, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import (
    W3_CHANNEL,
    W4,
    W4_SYMMETRIC,
    W8,
    edit_tensors,
    random_quantized,
    write_checkpoint,
)
from tiny_models import random_ids, tiny_model
from transformers import AutoModelForCausalLM

import rotq.devices
from rotq.checkpoint.load import load_model, load_tokenizer
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.scheme import ROTQ_VERSION
from rotq.checkpoint.source import read_tensor
from rotq.errors import RotqError
from rotq.formats.activations import ActivationGrid
from rotq.formats.integer import Grid
from rotq.layers.online_heads import OnlineHeads
from rotq.layers.online_linear import OnlineLinear
from rotq.layers.quant_linear import QuantLinear

FORMATS = ["compressed-tensors", "rotq"]
GRIDS = {"W4 groups": W4, "W4 symmetric": W4_SYMMETRIC, "W3 per channel": W3_CHANNEL}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(random_ids(2, 12), use_cache=False).logits


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_logits_in_memory_packed_and_in_transformers(
    tmp_path: Path, format: str, grid: str, dtype: torch.dtype
) -> None:
    """The proof of ``stored_scale_dtype``: fp16 scales are asked for in every case."""
    written = write_checkpoint(tmp_path, grids=(GRIDS[grid],), format=format, dtype=dtype)
    expected = logits(written.dense)
    ours = load_model(written.path)
    assert isinstance(ours.model.layers[1].mlp.up_proj, QuantLinear)
    assert not any(isinstance(m, torch.nn.Linear) for m in ours.model.layers.modules())
    assert torch.equal(logits(ours), expected)
    theirs = AutoModelForCausalLM.from_pretrained(written.path).eval()
    assert theirs.dtype == dtype
    assert torch.equal(logits(theirs), expected)


@pytest.mark.parametrize(
    ("dtype", "grid"),
    [(torch.bfloat16, W4_SYMMETRIC), (torch.float32, W4)],
    ids=["bf16 symmetric", "fp32 asymmetric"],
)
def test_fp16_scales_would_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, grid: Grid
) -> None:
    """Why ``stored_scale_dtype`` overrides the recipe."""
    monkeypatch.setattr("tiny_checkpoints.stored_scale_dtype", lambda wanted, *_, **__: wanted)
    written = write_checkpoint(tmp_path, grids=(grid,), dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(written.path).eval()
    assert not torch.equal(logits(theirs), logits(written.dense))


def test_two_symmetric_grids(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, grids=(W4_SYMMETRIC, W8))
    expected = logits(written.dense)
    assert torch.equal(logits(load_model(written.path)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(written.path).eval()), expected)


def test_two_asymmetric_grids_load_in_rotq_only(tmp_path: Path) -> None:
    """When transformers learns to, this fails and ``transformers_obstacle`` can go."""
    written = write_checkpoint(tmp_path, grids=(W4, W3_CHANNEL))
    assert torch.equal(logits(load_model(written.path)), logits(written.dense))
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(written.path)
    assert "does not load them" in (written.path / "README.md").read_text()


@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_online_rotation(tmp_path: Path, packed: bool, block_size: int | None) -> None:
    written = write_checkpoint(tmp_path, format="rotq", rotated=True, block_size=block_size)
    model = load_model(written.path, packed=packed)
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down, QuantLinear if packed else OnlineLinear)
    assert down.input_signs.shape == (block_size or 80,)
    assert not torch.equal(down.input_signs, torch.ones_like(down.input_signs))
    assert torch.equal(logits(model), logits(written.dense))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe-mixed", "gemma3", "llama-biases"])
@pytest.mark.parametrize("format", FORMATS)
def test_families(tmp_path: Path, family: str, format: str) -> None:
    written = write_checkpoint(tmp_path, family, format=format)
    assert torch.equal(logits(load_model(written.path)), logits(written.dense))
    if format == "rotq":
        model = AutoModelForCausalLM.from_pretrained(written.path).eval()
        assert torch.equal(logits(model), logits(written.dense))


A4 = ActivationGrid(bits=4, symmetric=False)
A8 = ActivationGrid(bits=8, symmetric=True)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
@pytest.mark.parametrize("family", ["llama-biases", "gemma3", "qwen3-moe-mixed"])
def test_inputs_and_heads_are_rounded(tmp_path: Path, family: str, packed: bool) -> None:
    heads = OnlineHeads(rotated=True, grid=A4)
    written = write_checkpoint(
        tmp_path, family, format="rotq", rotated=True, inputs=A4, heads=heads
    )
    model = load_model(written.path, packed=packed)
    assert torch.equal(logits(model), logits(written.dense))
    down = next(m for n, m in model.named_modules() if n.endswith("down_proj"))
    assert down.input_grid == A4
    down.input_grid = None
    assert not torch.equal(logits(model), logits(written.dense))
    plain = AutoModelForCausalLM.from_pretrained(written.path).eval()
    assert torch.equal(logits(plain), logits(written.dense))


@pytest.mark.parametrize("inputs", [A4, A8], ids=str)
@pytest.mark.parametrize("grids", [(W4_SYMMETRIC,), (W4_SYMMETRIC, W8)], ids=str)
def test_transformers_rounds_inputs_as_rotq(
    tmp_path: Path, grids: tuple[Grid, ...], inputs: ActivationGrid
) -> None:
    """The grids are those of compressed-tensors, bit by bit in fp32."""
    written = write_checkpoint(tmp_path, grids=grids, inputs=inputs)
    theirs = AutoModelForCausalLM.from_pretrained(written.path).eval()
    assert torch.equal(logits(theirs), logits(written.dense))
    assert torch.equal(logits(load_model(written.path)), logits(written.dense))


def test_rounded_heads_need_sdpa(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, format="rotq", heads=OnlineHeads(grid=A4))
    with pytest.raises(RotqError, match="LlamaForCausalLM uses eager attention"):
        AutoModelForCausalLM.from_pretrained(written.path, attn_implementation="eager")


def test_dense_from_packed(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path)
    model = load_model(written.path, packed=False)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert torch.equal(logits(model), logits(written.dense))
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(load_model(tmp_path / "dense")), logits(written.dense))


def test_save_pretrained_keeps_the_packed_tensors(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, format="rotq", rotated=True, block_size=16)
    model = AutoModelForCausalLM.from_pretrained(written.path)
    model.save_pretrained(tmp_path / "again")
    stored, again = (
        {entry.name: read_tensor(entry) for entry in read_entries(folder / "model.safetensors")}
        for folder in (written.path, tmp_path / "again")
    )
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(written.dense))


def test_shards(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, max_shard_bytes=20_000)
    assert len(list(written.path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load_model(written.path)), logits(written.dense))


def test_another_dtype_keeps_scales_as_stored(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, format="rotq")
    model = load_model(written.path, dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.weight_scale.dtype == torch.float16
    assert layer.weight_packed.dtype == torch.int32
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["dense", *FORMATS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fast_is_fp32_on_a_cpu_without_products_in_16_bits(
    format: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dense"
    if format == "dense":
        tiny_model("llama", dtype=dtype).save_pretrained(path)
    else:
        path = write_checkpoint(tmp_path, format=format, dtype=dtype).path
    monkeypatch.setattr(rotq.devices, "multiplies", lambda *_: True)
    assert load_model(path, dtype="fast").dtype == dtype
    monkeypatch.setattr(rotq.devices, "multiplies", lambda *_: False)
    fast, auto = load_model(path, dtype="fast"), load_model(path)
    assert (fast.dtype, auto.dtype) == (torch.float32, dtype)
    assert torch.equal(logits(fast), logits(load_model(path, dtype=torch.float32)))
    monkeypatch.setattr("rotq.checkpoint.load.physical_memory", lambda: 10_000)
    assert load_model(path, dtype="fast").dtype == dtype


def test_dense_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("qwen2", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


def test_missing_path_and_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RotqError, match="does not exist"):
        load_model(tmp_path / "none")
    with pytest.raises(RotqError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(RotqError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    edit_tensors(tmp_path, {"model.embed_tokens.weight": torch.zeros(103, 48)})
    with pytest.raises(RotqError) as caught:
        load_model(tmp_path)
    assert "1 mismatched keys, first model.embed_tokens.weight" in str(caught.value)
    assert "shape [103, 48], its configuration says [97, 48]" in str(caught.value)


def test_a_library_that_panics_is_an_error_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As PyO3 raises them."""

    def panic(*_: object, **__: object) -> None:
        raise Panic("called `Option::unwrap()` on a `None` value\nnote: run with RUST_BACKTRACE")

    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", panic)
    for read in (load_tokenizer, load_model):
        with pytest.raises(RotqError, match=r"called `Option::unwrap\(\)`") as caught:
            read(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "1 missing keys, first model.norm.weight"),
        ({f"{Q}.weight_packed": None}, f"{Q} is quantized, but"),
        ({f"{Q}.weight_zero_point": None}, f"no tensor {Q}.weight_zero_point"),
        ({f"{Q}.weight_packed": torch.zeros(64, 7, dtype=torch.int32)}, "expected"),
        ({f"{Q}.weight_g_idx": torch.zeros(48, dtype=torch.int32)}, "1 unexpected keys"),
    ],
    ids=["dense tensor", "packed tensor", "zero point", "shape", "extra"],
)
@pytest.mark.parametrize("format", FORMATS)
def test_incomplete_checkpoints_are_refused(
    tmp_path: Path, format: str, change: dict[str, torch.Tensor | None], message: str
) -> None:
    written = write_checkpoint(tmp_path, format=format)
    edit_tensors(written.path, change)
    with pytest.raises(RotqError, match=message):
        load_model(written.path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "awq"}, "quantized with awq"),
        ({"version": ROTQ_VERSION + 1, "quant_method": "rotq"}, f"rotq format {ROTQ_VERSION + 1}"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "KV cache"),
        ({"config_groups": {}}, "no config_groups"),
        ({"format": "int-quantized"}, "int-quantized"),
        ({"online": {"dct": ["Linear"]}}, "online rotation dct"),
        ({"online": {"hadamard": ["Linear"], "block_size": "8"}}, "block_size .* not a size: '8'"),
        ({"online": {"hadamard": ["Linear"], "block_size": 0}}, "block_size .* not a size: 0"),
        ({"online": {"residual": "dct"}}, "unknown online.residual dct"),
        ({"online": {"hadamard": ["Linear"], "block_size": 6}}, "no Hadamard matrix of order 6"),
        (
            {"online": {"hadamard": ["Linear"], "block_size": 32}},
            "_proj: rotated blocks of 32 do not divide 48 features",
        ),
        (
            {"online": {"butterfly": ["Linear"]}, "version": 3, "quant_method": "rotq"},
            r"out: .* learned fast rotation, .* no longer has; commit 687066b is the last",
        ),
        ({"attention": {"rotation": "dct"}}, "rotation of heads dct"),
        ({"attention": {"kv_cache": {"dynamic": False}}}, "rotq runs dynamic int per token"),
        (
            {"attention": {"kv_cache": {"dynamic": True, "strategy": "token", "num_bits": 4}}},
            "kv_cache of quantization_config is not valid",
        ),
        (
            {"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}},
            "transform R4",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unknown_quantization_is_refused(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    written = write_checkpoint(tmp_path)
    config = json.loads((written.path / "config.json").read_text())
    quantization = config["quantization_config"] | fields
    if "format" in fields:
        quantization["config_groups"]["group_0"]["format"] = None
    config["quantization_config"] = quantization
    (written.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RotqError, match=message):
        load_model(written.path)


def test_random_scales_are_what_the_tests_need() -> None:
    """Scales that are not powers of two, so that wrong dtypes show."""
    scale_NG = random_quantized(8, 32, W4).scale_NG
    assert (scale_NG.bfloat16().half() != scale_NG).any()
