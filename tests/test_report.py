"""Reports as data, as tables, and while a job runs."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from job_reports import layer_result, make_report

from rotq.recipe import Recipe, Weights
from rotq.report import Estimate, JobReport, SiteEstimate, peak_rss
from rotq.report.columns import WIDTH
from rotq.report.lines import larger_line, recipe_line, runtime_line
from rotq.report.progress import PlainProgress, RichProgress
from rotq.report.tables import estimate_table, evaluation_table, inspection_table, job_table

EVALUATION = {
    "ppl": 31.2345,
    "reference_ppl": 22.55,
    "kl": 0.31,
    "top1": 0.725,
    "tokens": 1023,
    "protocol": "windowed: first 1 window",
}


def test_report_survives_json() -> None:
    report = make_report(evaluation=EVALUATION, notes=("careful",))
    assert JobReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize(
    "change", [{"schema_version": 99}, {"unknown": 1}, {"layers": [{"name": "x"}]}]
)
def test_report_of_another_shape_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="schema"):
        JobReport.from_dict({**make_report().to_dict(), **change})


def test_peak_memory_is_in_bytes() -> None:
    assert 10e6 < peak_rss() < 100e9


def test_job_table_says_what_it_cost() -> None:
    layers = tuple(
        layer_result(f"model.layers.{i}.mlp.down_proj", relative_error=i / 100, seconds=9.0 - i)
        for i in range(8)
    )
    report = make_report(layers=layers, evaluation=EVALUATION, notes=("careful",))
    table = job_table(report, Path("out/x"))
    assert "5.48 all in, 3.30 in the quantized linears" in table
    assert "92.1 MB, 17.1% of 538.1 MB" in table
    assert "31.23, the original's 22.55" in table
    assert "0.31 nats per token" in table
    assert "72.5%" in table
    assert "1:31 min, peak memory 1.20 GB" in table
    assert "note: careful" in table
    assert "residual hadamard 12x8; logits kept to 1.0e-12" in table
    worst, slowest = table.split("slowest layers")
    assert worst.index("layers.7.") < worst.index("layers.6.")
    assert slowest.index("layers.0.") < slowest.index("layers.1.")
    assert "layers.2." not in worst
    assert all(len(line) <= WIDTH for line in table.splitlines())


def test_tuning_is_told() -> None:
    tuning = {"steps": 48, "kl_first_quarter": 0.25, "kl_last_quarter": 0.2}
    table = job_table(make_report(tuning=tuning), Path("out"))
    assert "48 steps, KL 0.25 to 0.2 in training" in table
    assert "tuning" not in job_table(make_report(), Path("out"))


def test_long_names_fit_the_width() -> None:
    layers = (layer_result("model.layers.10.block_sparse_moe.experts.127.down_proj." + "x" * 40),)
    table = job_table(make_report(layers=layers), Path("out") / ("y" * 100))
    assert all(len(line) <= WIDTH for line in table.splitlines())
    assert "x" * 10 in table


def test_evaluation_without_reference_has_no_divergence() -> None:
    alone = {**EVALUATION, "kl": None, "top1": None, "reference_ppl": None}
    table = evaluation_table(alone)
    assert "KL" not in table
    assert "original" not in table


def test_estimate_table_joins_layers_of_one_kind() -> None:
    sites = tuple(
        SiteEstimate(
            name=f"model.layers.{i}.mlp.up_proj",
            shape=(256, 96),
            bits=3,
            group_size=group,
            bits_per_weight=3.4,
        )
        for i, group in enumerate([48, 48, -1])
    )
    estimate = Estimate(
        sites=sites,
        bits_per_weight=3.4,
        output_bytes=2_500_000,
        peak_memory_bytes=1_500_000_000,
        scratch_disk_bytes=10**6,
    )
    table = estimate_table(estimate)
    assert "model.layers.*.mlp.up_proj (2)" in table
    assert "channel" in table
    assert "1.50 GB" in table
    assert json.loads(json.dumps(estimate.to_dict()))["sites"][0]["shape"] == [256, 96]


def test_what_was_packed_outside_the_blocks_is_told() -> None:
    report = make_report(outer=(layer_result("model.embed_tokens"),))
    assert "outside the blocks" in job_table(report, Path("out"))
    assert "model.embed_tokens 3.40 bits" in job_table(report, Path("out"))
    assert "outside the blocks" not in job_table(make_report(), Path("out"))


def test_a_larger_result_is_told_in_a_dry_run() -> None:
    line = larger_line(104_000_000, 98_000_000, is_packed=False)
    assert line is not None
    assert line.startswith("the weights take 104.0 MB, more than the 98.0 MB of the quantized file")
    estimate = Estimate(
        sites=(),
        bits_per_weight=3.4,
        output_bytes=104_000_000,
        peak_memory_bytes=1,
        scratch_disk_bytes=1,
        notes=(line,),
    )
    assert f"note: {line}" in estimate_table(estimate)
    assert larger_line(98_000_000, 98_000_000, is_packed=False) is None
    assert larger_line(98_000_000, 0, is_packed=False) is None


def test_recipe_line() -> None:
    values = Recipe(name="mine").to_dict()
    values["rotation"] |= {"residual": "hadamard", "down": "hadamard"}
    assert recipe_line(values) == (
        "mine: 4 bits, group 128, asymmetric, gptq, rotated residual+down"
    )
    packed = Recipe(weights=Weights(embedding=6, head=8)).to_dict()
    assert recipe_line(packed).endswith("gptq, embedding 6 bits, head 8 bits")


def test_runtime_line() -> None:
    rounding = {"num_bits": 4, "symmetric": False}
    config = {
        "config_groups": {"group_0": {"input_activations": {"num_bits": 8, "symmetric": True}}},
        "online": {"hadamard": ["a", "b"]},
        "attention": {"rotation": "hadamard", "kv_cache": rounding},
    }
    assert runtime_line(config) == (
        "inputs 8 bits symmetric per token; keys and values 4 bits asymmetric per head and token; "
        "hadamard on queries and keys; hadamard before 2 targets"
    )
    config = {"online": {"hadamard": ["a"], "block_size": 64}}
    assert runtime_line(config) == "hadamard in blocks of 64 before 1 targets"
    assert runtime_line({"config_groups": {"group_0": {"input_activations": None}}}) == ""
    assert runtime_line({}) == ""


def test_inspection_of_a_foreign_checkpoint() -> None:
    found = {
        "path": "x",
        "files": {"model.safetensors": 2_000_000, "tokenizer.json": 5},
        "quantization_config": None,
    }
    table = inspection_table(found, None, None)
    assert "2.0 MB" in table
    assert "rotq did not write" in table


def test_plain_progress_writes_a_line_per_block() -> None:
    stream = io.StringIO()
    with PlainProgress(stream) as progress:
        for index in (3, 4):
            progress.block_started(index, 5)
            progress.layer_done(layer_result(f"model.layers.{index}.mlp.up_proj"))
            bad = layer_result(f"model.layers.{index}.mlp.down_proj", relative_error=0.5)
            progress.layer_done(bad)
            progress.block_done(index, 2.0, 10**9)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("block 4/5  worst mlp.down_proj 50.00%  2.0 s  peak 1.00 GB")
    assert lines[1].endswith("0:00 left")


def test_plain_progress_tells_how_far_gradients_are(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("rotq.report.progress.time.monotonic", lambda: now)
    stream = io.StringIO()
    with PlainProgress(stream) as progress:
        for way, seconds in (("forward", 1.0), ("backward", 10.0)):
            for done in range(1, 17):
                now += seconds
                progress.gradient_block(way, done, 16)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 16
    assert lines[0] == "gradients forward 2/16 blocks  0:14 left"
    assert lines[7] == "gradients forward 16/16 blocks  0:00 left"
    assert lines[8] == "gradients backward 2/16 blocks  2:20 left"


def test_rich_progress_keeps_stdout_clean(capsys: pytest.CaptureFixture[str]) -> None:
    with RichProgress() as progress:
        progress.gradient_block("backward", 1, 2)
        progress.block_started(0, 2)
        progress.layer_done(layer_result("model.layers.0.mlp.up_proj", relative_error=0.25))
        progress.message("[not markup]")
        progress.block_done(0, 1.0, 10**9)
    out, err = capsys.readouterr()
    assert out == ""
    assert "[not markup]" in err
    assert "1/2" in err


def test_layer_results_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer_result("x").bits = 2  # type: ignore[misc]
