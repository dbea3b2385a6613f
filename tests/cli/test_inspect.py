"""`rotq inspect` on folders made by hand."""

import hashlib
import json
import sys
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


def test_what_the_runtime_must_do_has_a_line(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    rounding = {"num_bits": 4, "symmetric": True}
    config["quantization_config"]["attention"] = {"rotation": None, "kv_cache": rounding}
    (checkpoint / "config.json").write_text(json.dumps(config))
    line = "at run time       keys and values 4 bits symmetric per head and token"
    assert line in run(checkpoint).stdout


def with_flatness(checkpoint: Path) -> Path:
    def figures(number: float) -> dict[str, float | None]:
        return {"max_over_rms": number, "kurtosis": 9.0, "spread": 4.0, "log_qsur": None}

    flatness = {
        f"model.layers.{index}.{site}": {
            "before": figures(20.0 + index),
            "after": figures(4.0),
        }
        for index in range(3)
        for site in ("qkv", "down")
    }
    (checkpoint / REPORT).write_text(json.dumps(make_report(flatness=flatness).to_dict()))
    return checkpoint


def test_flatness_has_a_line(checkpoint: Path) -> None:
    assert (
        "max/rms of inputs  qkv 21.0 to 4.0, down 21.0 to 4.0"
        in run(with_flatness(checkpoint)).stdout
    )


def test_plots(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run(with_flatness(checkpoint), "--plots", tmp_path / "new" / "figures")
    assert result.exit_code == 0, result.stderr
    image = (tmp_path / "new" / "figures" / "flatness.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert "figures/flatness.png" in result.stderr


def test_a_plot_is_replaced_and_another_picture_is_not(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with_flatness(checkpoint)
    figure = tmp_path / "new" / "flatness.png"
    for _ in range(2):
        assert run(checkpoint, "--plots", tmp_path / "new").exit_code == 0
    figure.write_bytes(figure.read_bytes().replace(b"rotq inspect", b"a camera at "))
    before = figure.read_bytes()
    result = run(checkpoint, "--plots", tmp_path / "new")
    assert result.exit_code == 1
    assert "exists and is no plot of rotq's; rotq replaces only what it has" in result.stderr
    assert figure.read_bytes() == before
    assert [path.name for path in figure.parent.iterdir()] == ["flatness.png"]


def test_plots_without_matplotlib_name_the_extra(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    result = run(with_flatness(checkpoint), "--plots", tmp_path)
    assert result.exit_code == 1
    assert "pip install 'rotq[plots]'" in result.stderr


def test_nothing_to_plot(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "--plots", tmp_path)
    assert result.exit_code == 1
    assert "reports no flatness, so there is nothing to plot" in result.stderr


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
    assert "none does not exist" in run(tmp_path / "none").stderr
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "holds no config.json" in result.stderr


def changed(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    "values",
    [
        {"recipe": {}},
        {"recipe": "w4"},
        {"original_bytes": 0},
        {"data": []},
        {"versions": None},
        {"evaluation": [1]},
        {"bits_per_weight": "few"},
    ],
)
def test_a_report_that_cannot_be_shown_is_a_line(
    checkpoint: Path, values: dict[str, object]
) -> None:
    changed(checkpoint / REPORT, **values)
    result = run(checkpoint)
    assert result.exit_code == 1
    assert f"{checkpoint}: its files are not as rotq writes them: " in result.stderr
    assert result.stderr.count("\n") == 1


def test_flatness_that_cannot_be_drawn_is_a_line(checkpoint: Path, tmp_path: Path) -> None:
    with_flatness(checkpoint)
    changed(checkpoint / REPORT, flatness={"a": "b"})
    result = run(checkpoint, "--plots", tmp_path / "plots")
    assert result.exit_code == 1
    assert "the flatness in its report cannot be drawn" in result.stderr


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json"], "lists no files to verify"),
        ({}, "lists no files to verify"),
        ({"../../etc": "0"}, "lists '../../etc', which is outside of the folder"),
        ({"/etc/passwd": "0"}, "lists '/etc/passwd', which is outside of the folder"),
        ({"a\0b": "0"}, "embedded null byte"),
        ({"x" * 5000: "0"}, "File name too long"),
    ],
)
def test_provenance_names_files_of_its_folder(
    checkpoint: Path, files: object, message: str
) -> None:
    (checkpoint / PROVENANCE).write_text(json.dumps({"files": files}))
    result = run(checkpoint, "--verify")
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr) < 500


def test_foreign_names_are_no_markup_and_command_no_terminal(checkpoint: Path) -> None:
    notes = ["[/red] and [bold]", "\x1b[2J gone", ":smile:"]
    changed(checkpoint / REPORT, notes=notes, model="[/model]")
    result = run(checkpoint)
    assert result.exit_code == 0, result.stderr
    assert "[/model], sha256" in result.stdout
    assert "note: [/red] and [bold]" in result.stdout
    assert "note: \\x1b[2J gone" in result.stdout
    assert "\x1b" not in result.stdout
