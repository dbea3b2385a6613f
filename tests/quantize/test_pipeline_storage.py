"""What a job stores of the weights that it does not round as layers: in which bytes, and equal."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_words import SMALL, write_model
from torch import Tensor

import rotq.quantize.pipeline
import rotq.quantize.publish
import rotq.quantize.setup
from rotq.checkpoint.load import load_model
from rotq.checkpoint.opening import open_source
from rotq.checkpoint.safetensors import read_entries
from rotq.checkpoint.source import read_tensor
from rotq.errors import Stopped
from rotq.layers.quant_embedding import QuantEmbedding, TiedHead
from rotq.layers.quant_linear import QuantLinear
from rotq.quantize.estimate import estimate
from rotq.quantize.pipeline import quantize_model
from rotq.recipe import Recipe, load_recipe
from rotq.report import JobReport, Progress

ANY_GROUPS = {**SMALL, "weights.group_fallback": "auto"}
PACKED = {"weights.embedding": 6, "output.format": "rotq"}
HADAMARD = {"rotation.residual": "hadamard"}


pytestmark = pytest.mark.usefixtures("reloaded_here", "numbered_words")


def recipe(model: Path, changes: dict[str, Any]) -> Recipe:
    return load_recipe(
        None, {**ANY_GROUPS, "calibration.source": str(model / "text.txt"), **changes}
    )


def run(model: Path, output: Path, dtype: str = "auto", **changes: Any) -> JobReport:
    return quantize_model(model, recipe(model, changes), output, dtype=dtype)


def stored(path: Path) -> dict[str, Tensor]:
    return {entry.name: read_tensor(entry) for entry in read_entries(path / "model.safetensors")}


def config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


@pytest.mark.parametrize("rotated", [{}, HADAMARD], ids=["plain", "rotated"])
@pytest.mark.parametrize("name", ["llama-biases", "gpt2", "mixtral"])
def test_matrices_of_an_fp32_checkpoint_are_stored_in_bf16(
    name: str, rotated: dict[str, str], tmp_path: Path
) -> None:
    """The model computes in fp32 as before; that the reload is equal is checked by the job."""
    model = write_model(name, tmp_path / "model")
    report = run(model, tmp_path / "out", **rotated, **{"output.format": "rotq"})
    rest = {n: t for n, t in stored(tmp_path / "out").items() if t.is_floating_point()}
    rest = {name: tensor for name, tensor in rest.items() if not name.endswith("_scale")}
    assert {t.dtype for t in rest.values() if t.ndim > 1} == {torch.bfloat16}
    assert {t.dtype for t in rest.values() if t.ndim == 1} == {torch.float32}
    assert config(tmp_path / "out")["dtype"] == "float32"
    assert sum("stored in bfloat16" in note for note in report.notes) == 1


@pytest.mark.parametrize(
    ("source", "dtype", "expected"),
    [
        (torch.float32, "float32", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "float16", torch.float16),
    ],
    ids=["asked for", "bf16", "fp16", "other"],
)
def test_other_sources_and_what_is_asked_for_stay(
    source: torch.dtype, dtype: str, expected: torch.dtype, tmp_path: Path
) -> None:
    model = write_model("llama", tmp_path / "model", source)
    report = run(model, tmp_path / "out", dtype)
    assert stored(tmp_path / "out")["lm_head.weight"].dtype == expected
    assert not any("stored in" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "changes", "head"),
    [
        ("llama-tied", {}, TiedHead),
        ("llama-tied", {"weights.embedding": 8, "weights.outer_group_size": -1}, TiedHead),
        ("llama-tied", {**HADAMARD, "weights.head": 8}, QuantLinear),
        ("llama-tied", HADAMARD, torch.nn.Linear),
        ("llama", {"weights.head": 5}, QuantLinear),
        ("gemma3", {}, TiedHead),
        ("gpt2", {}, TiedHead),
        ("gpt2", {**HADAMARD, "weights.head": 6}, QuantLinear),
        ("esm", {}, TiedHead),
        ("esm", {**HADAMARD, "weights.head": 6}, QuantLinear),
        ("esmc", {"weights.head": 6}, QuantLinear),
        ("bert", {}, TiedHead),
        ("qwen3-moe", {"weights.head": 6}, QuantLinear),
    ],
    ids=str,
)
def test_embedding_and_head_are_packed(
    name: str, changes: dict[str, Any], head: type, tmp_path: Path
) -> None:
    """And the model that was measured is the one that is loaded, which the job checks."""
    model = write_model(name, tmp_path / "model")
    report = run(model, tmp_path / "out", **PACKED | changes)
    loaded = load_model(tmp_path / "out")
    assert isinstance(loaded.get_input_embeddings(), QuantEmbedding)
    assert type(loaded.get_output_embeddings()) is head
    assert loaded.get_input_embeddings().grid.bits == changes.get("weights.embedding", 6)
    assert config(tmp_path / "out")["quantization_config"]["version"] == 5
    bits = [layer.bits for layer in report.outer]
    assert bits == [
        loaded.get_input_embeddings().grid.bits,
        *[changes.get("weights.head")] * (head is QuantLinear),
    ]
    assert all(0 < layer.relative_error < 5e-3 for layer in report.outer)
    assert JobReport.from_dict(report.to_dict()) == report
    positions = [n for n in stored(tmp_path / "out") if "wpe" in n or "position_emb" in n]
    assert all(name.endswith(".weight") for name in positions)


def test_the_quantized_stream_begins_with_the_packed_embedding_and_the_original_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = write_model("llama-tied", tmp_path / "model"), {}
    start = rotq.quantize.pipeline.BlockQuantizer.quantize

    def look(self: Any, index: int, block: Any, streams: Any) -> Any:
        if index == 0:
            seen["original"], seen["quantized"] = (
                stream.hidden[0].clone() for stream in (streams.original, streams.quantized)
            )
            seen["ids"] = streams.batches[0].ids_BT
        return start(self, index, block, streams)

    monkeypatch.setattr(rotq.quantize.pipeline.BlockQuantizer, "quantize", look)
    run(model, tmp_path / "out", **PACKED)
    with torch.no_grad():
        packed_BTD = load_model(tmp_path / "out").get_input_embeddings()(seen["ids"])
        dense_BTD = load_model(model).get_input_embeddings()(seen["ids"])
    assert torch.equal(seen["quantized"], packed_BTD)
    assert torch.equal(seen["original"], dense_BTD)


def test_a_stopped_job_continues_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model("llama-tied", tmp_path / "model")
    run(model, tmp_path / "whole", **PACKED)

    class Impatient(Progress):
        def block_started(self, index: int, num_blocks: int) -> None:
            if index == 1:
                raise KeyboardInterrupt

    with pytest.raises(Stopped):
        quantize_model(model, recipe(model, PACKED), tmp_path / "out", progress=Impatient())
    run(model, tmp_path / "out", **PACKED)
    whole, again = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "out"))
    assert whole == again


@pytest.mark.parametrize(
    "changes",
    [{}, PACKED, {**PACKED, **HADAMARD, "weights.head": 6}],
    ids=["dense", "tied", "both"],
)
def test_the_estimate_counts_what_is_stored(changes: dict[str, Any], tmp_path: Path) -> None:
    """Up to vectors, which stay in fp32, and the header."""
    model = write_model("llama-tied", tmp_path / "model")
    report = run(model, tmp_path / "out", **changes)
    found = estimate(model, recipe(model, changes))
    vectors = sum(2 * t.numel() for t in stored(tmp_path / "out").values() if t.ndim == 1)
    shapes = sum(16 for name in stored(tmp_path / "out") if name.endswith("weight_shape"))
    tensors = sum(t.numel() * t.element_size() for t in stored(tmp_path / "out").values())
    assert abs(found.output_bytes + vectors + shapes - tensors) < 0.02 * tensors
    assert report.bytes >= tensors
    assert [site.name for site in found.sites][len(report.layers) :] == [
        x.name for x in report.outer
    ]


@pytest.mark.parametrize("name", ["llama-tied", "bert"])
def test_a_shared_head_is_unpacked_in_tiles_in_the_job_as_in_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles may be summed in another order than the whole; the job's check is of the same ones."""
    module = importlib.import_module("rotq_kernels.packed_linear")
    rows: list[int] = []
    reference = module.packed_linear_reference

    def watched(x_MK: Tensor, words_NW: Tensor, *rest: Any) -> Tensor:
        rows.append(len(words_NW))
        return reference(x_MK, words_NW, *rest) + (0.25 if len(words_NW) == 32 else 0)

    monkeypatch.setattr(module, "CPU_TILE", 32 * 48)
    monkeypatch.setattr(module, "packed_linear_reference", watched)
    run(write_model(name, tmp_path / "model"), tmp_path / "out", **PACKED, **{"tuning.steps": 0})
    assert rows == [32, 32, 32, 1] * 2


@pytest.mark.parametrize("changes", [{}, PACKED], ids=["dense", "packed"])
def test_a_result_that_is_larger_than_its_quantized_source_says_so(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the job and before it; the advice is for those who do not follow it yet."""
    model = write_model("llama-tied", tmp_path / "model")
    for size, expected in ((20_000, True), (2_000_000, False)):

        def of_that_size(*args: Any, size: int = size, **options: Any) -> Any:
            return replace(open_source(*args, **options), quantized_bytes=size)

        monkeypatch.setattr(rotq.quantize.setup, "open_source", of_that_size)
        monkeypatch.setattr(rotq.quantize.setup, "describe_source", of_that_size)
        report = run(model, tmp_path / f"out-{size}", **changes)
        for notes in (report.notes, estimate(model, recipe(model, changes)).notes):
            larger = [
                note for note in notes if "more than the 0.0 MB of the quantized file" in note
            ]
            assert len(larger) == expected
            assert all(("weights.embedding=6" in note) == (not changes) for note in larger)
