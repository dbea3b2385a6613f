"""`rotq quantize --profile`: a trace in a file, a table on stderr, and the job as without."""

import json
from pathlib import Path

import pytest
from tiny_jobs import W3, files_of, make_checkpoint, quantize

PHASES = {
    *("setup", "load", "forward passes", "moments", "factor", "scales", "columns", "sweeps"),
    *("tuning", "packing", "checks", "other"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("profiled") / "model", num_layers=1)


def test_a_job_s_phases_are_in_the_table_and_the_trace(model: Path, tmp_path: Path) -> None:
    trace, options = tmp_path / "trace.json", (*W3, "--calibration", "pydoc")
    result = quantize(model, "-o", tmp_path / "out", "--profile", trace, *options)
    assert result.exit_code == 0, result.stderr
    document = json.loads(trace.read_bytes())
    events = document["traceEvents"]
    assert {event["name"] for event in events} >= PHASES
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in events)
    for name in PHASES:
        assert any(line.startswith(f"{name} ") for line in result.stderr.splitlines()), name
    plain = quantize(model, "-o", tmp_path / "plain", *options)
    assert plain.exit_code == 0
    weights = [files_of(tmp_path / name)["model.safetensors"] for name in ("out", "plain")]
    assert weights[0] == weights[1]


def test_a_foreign_file_is_not_replaced_and_nothing_is_run(model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text('{"traceEvents": []}')
    result = quantize(model, "-o", tmp_path / "out", "--profile", trace)
    assert result.exit_code == 1
    assert "is no trace of rotq's; rotq replaces only what it has written" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_trace_is_not_written_into_the_output(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = quantize(model, "-o", tmp_path / "out", "--profile", tmp_path / "out" / "trace.json")
    assert result.exit_code == 1
    assert "lies inside the output" in result.stderr


def test_a_dry_run_has_no_profile(model: Path, tmp_path: Path) -> None:
    result = quantize(model, "--dry-run", "--profile", tmp_path / "trace.json")
    assert result.exit_code == 2
    assert "--profile records a job, and --dry-run runs none" in result.stderr
