"""`rotq inspect` on folders made by hand."""

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from job_reports import make_report

from rotq.checkpoint.inspection import PROVENANCE, RECIPE, REPORT
from rotq.cli.main import main


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 3}}},
        "ignore": ["lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    (tmp_path / "model.safetensors").write_bytes(bytes(2_500_000))
    (tmp_path / RECIPE).write_text("name: made-up\n")
    (tmp_path / REPORT).write_text(json.dumps(make_report().to_dict()))
    files = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }
    (tmp_path / PROVENANCE).write_text(json.dumps({"files": files}))
    return tmp_path


def test_table(checkpoint: Path) -> None:
    result = run(checkpoint)
    assert result.exit_code == 0, result.stderr
    for part in (
        "2.5 MB",
        "compressed-tensors, pack-quantized, 3 bits, 1 modules kept",
        "5.48 all in",
        "made-up: ",
        "tiny, sha256 0123456789ab",
        "pydoc, 1000 tokens, sha256 fedcba987654",
        "model.layers.0.mlp.up_proj",
    ):
        assert part in result.stdout
    assert "verified" not in result.stdout


def test_json(checkpoint: Path) -> None:
    found = json.loads(run(checkpoint, "--json", "--verify").stdout)
    assert found["recipe"] == {"name": "made-up"}
    assert found["report"]["bits_per_weight_all_in"] == 5.48
    assert found["files"]["model.safetensors"] == 2_500_000
    assert found["verified_files"] == 2
    assert json.loads(run(checkpoint, "--json").stdout)["verified_files"] is None


def test_verify(checkpoint: Path) -> None:
    result = run(checkpoint, "--verify")
    assert result.exit_code == 0
    assert "2 files have the sha256" in result.stdout


def test_one_changed_byte_is_found(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[1_000_000] ^= 1
    weights.write_bytes(data)
    assert run(checkpoint).exit_code == 0
    result = run(checkpoint, "--verify")
    assert (result.exit_code, result.stdout) == (3, "")
    assert f"{weights} was changed" in result.stderr


def test_missing_file_is_found(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    result = run(checkpoint, "--verify")
    assert result.exit_code == 3
    assert "model.safetensors is missing" in result.stderr


def test_foreign_checkpoint(checkpoint: Path) -> None:
    for name in (PROVENANCE, RECIPE, REPORT):
        (checkpoint / name).unlink()
    result = run(checkpoint)
    assert result.exit_code == 0
    assert "rotq did not write" in result.stdout
    result = run(checkpoint, "--verify")
    assert result.exit_code == 1
    assert f"has no {PROVENANCE}" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "is not JSON"),
        (REPORT, '{"schema_version": 99}', "schema_version 99, expected 1"),
        (RECIPE, "a: [", "not YAML"),
        (RECIPE, "- a", "is not a recipe"),
    ],
)
def test_unreadable_file_is_named(checkpoint: Path, name: str, content: str, message: str) -> None:
    (checkpoint / name).write_text(content)
    result = run(checkpoint)
    assert result.exit_code == 1
    assert name in result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_no_checkpoint(tmp_path: Path) -> None:
    assert "no such folder" in run(tmp_path / "none").stderr
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "holds no config.json" in result.stderr
