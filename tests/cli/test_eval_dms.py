"""``rotq eval dms``: figures, results that are gone on with, and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_models import tiny_model
from tiny_proteins import esm_tokenizer, write_fasta

import rotq.evaluation.dms
from rotq.cli.main import main

WILD = "MKTAYIAKQRQISFVKSHFSRQ"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="rotq")


def write_assay(file: Path, number: int, *, step: int = 1) -> Path:
    lines = ["mutant,mutated_sequence,DMS_score"]
    for variant in range(number):
        position = (step * variant) % len(WILD)
        letter = "W" if variant < len(WILD) else "C"
        mutated = f"{WILD[:position]}{letter}{WILD[position + 1 :]}"
        mutant = f"{WILD[position]}{position + 1}{letter}"
        lines.append(f"{mutant},{mutated},{(variant * 7) % 11}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and one that differs from it a little."""
    folders = []
    for name, noise in (("esm", 0.0), ("noisy", 0.02)):
        folder = tmp_path_factory.mktemp(name)
        model = tiny_model("esm", dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
        esm_tokenizer(folder).save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


@pytest.fixture
def assays(tmp_path: Path) -> Path:
    folder = tmp_path / "assays"
    folder.mkdir()
    write_assay(folder / "A.csv", 12)
    write_assay(folder / "B.csv", 15, step=3)
    return folder


def figures(*arguments: str | Path) -> dict[str, Any]:
    done = run("eval", "dms", *arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_figures_of_a_folder_of_assays(models: tuple[Path, Path], assays: Path) -> None:
    found = figures(models[1], "--assay", assays, "--reference", models[0])
    assert list(found["assays"]) == ["A", "B"]
    row = found["assays"]["A"]["masked-marginals"]
    assert 0.5 < row["reference"] < 1
    changes = {
        name: abs(one["masked-marginals"]["assay"] - one["masked-marginals"]["reference_assay"])
        for name, one in found["assays"].items()
    }
    mean = found["mean"]["masked-marginals"]
    assert mean["worst_assay"] == max(changes, key=lambda name: changes[name])
    assert mean["worst_change"] == pytest.approx(max(changes.values()))
    assert mean["change"] == pytest.approx(sum(changes.values()) / 2)
    itself = figures(models[0], "--assay", assays / "A.csv", "--reference", models[0])
    assert itself["assays"]["A"]["wt-marginals"]["reference"] == pytest.approx(1)


def test_as_a_table(models: tuple[Path, Path], assays: Path) -> None:
    done = run("eval", "dms", models[0], "--assay", assays, "--variants", "4", "--score", "pll")
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:3] for row in rows if row[:1] in (["A"], ["B"])] == [
        ["A", "4", "pll"],
        ["B", "4", "pll"],
    ]
    assert "reference" not in done.stdout


def test_a_run_goes_on_where_the_last_one_stopped(
    models: tuple[Path, Path], assays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments: list[str | Path] = [
        models[1],
        "--assay",
        assays,
        "--reference",
        models[0],
        "-o",
        out,
    ]
    scored: list[str] = []
    stop = [True]
    score = rotq.evaluation.dms.score_assay

    def stopping(found: Any, assay: Any, *rest: Any) -> Any:
        if assay.name == "B" and stop.pop():
            raise KeyboardInterrupt
        scored.append(assay.name)
        return score(found, assay, *rest)

    monkeypatch.setattr(rotq.evaluation.dms, "score_assay", stopping)
    first = run("eval", "dms", *arguments)
    assert first.exit_code != 0
    assert (out / "A.csv").exists()
    assert not (out / "B.csv").exists()
    assert scored == ["A"]
    stop.append(False)
    again = figures(*arguments)
    assert scored == ["A", "B"]
    stop.append(False)
    plain = figures(*arguments[:-2])
    for name in ("A", "B"):
        assert again["assays"][name].items() >= plain["assays"][name].items()
    rows = list(csv.DictReader((out / "A.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 12
    assert set(rows[0]) == {
        "mutant",
        "measured",
        *(f"{who}{kind}" for who in ("", "reference ") for kind in again["mean"]),
    }


def test_a_changed_assay_is_scored_again(
    models: tuple[Path, Path], assays: Path, tmp_path: Path
) -> None:
    arguments: list[str | Path] = [models[0], "--assay", assays / "A.csv", "-o", tmp_path / "out"]
    assert figures(*arguments)["assays"]["A"]["variants"] == 12
    write_assay(assays / "A.csv", 9)
    assert figures(*arguments)["assays"]["A"]["variants"] == 9


def test_a_plot_of_each_assay(models: tuple[Path, Path], assays: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: list[str | Path] = [
        models[1],
        "--assay",
        assays,
        "--reference",
        models[0],
        "-o",
        out,
    ]
    figures(*arguments)
    assert not list(out.glob("*.png"))
    figures(*arguments, "--plot")
    assert sorted(file.name for file in out.glob("*.png")) == ["A.png", "B.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in out.glob("*.png"))
    figures(*arguments, "--plot")


@pytest.mark.parametrize(
    ("occupied", "message"),
    [
        ("A.csv", "A.csv exists and is no result of this run"),
        ("A.png", "A.png exists and is no plot of rotq's"),
        ("dms.json", "dms.json is not rotq's"),
    ],
)
def test_files_of_others_stay(
    models: tuple[Path, Path], assays: Path, tmp_path: Path, occupied: str, message: str
) -> None:
    (tmp_path / occupied).write_text('{"mine": 1}', encoding="utf-8")
    done = run("eval", "dms", models[0], "--assay", assays, "-o", tmp_path, "--plot")
    assert done.exit_code == 1
    assert message in done.stderr
    assert (tmp_path / occupied).read_text(encoding="utf-8") == '{"mine": 1}'


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--window", "16"], "another window"),
        (["--score", "pll"], "another kinds"),
        (["--dtype", "bfloat16"], "another dtype"),
    ],
)
def test_results_of_something_else_are_not_mixed(
    models: tuple[Path, Path], assays: Path, tmp_path: Path, changed: list[str], message: str
) -> None:
    arguments: list[str | Path] = [models[0], "--assay", assays / "A.csv", "-o", tmp_path / "out"]
    figures(*arguments)
    done = run("eval", "dms", *arguments, *changed)
    assert done.exit_code == 1
    assert message in done.stderr
    other = run("eval", "dms", models[1], *arguments[1:])
    assert other.exit_code == 1
    assert "another models" in other.stderr


def test_without_sequences_a_fasta_has_the_wild_type(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    whole = write_assay(tmp_path / "whole.csv", 8)
    short = tmp_path / "short.csv"
    rows = [line.split(",") for line in whole.read_text().splitlines()]
    short.write_text("\n".join(f"{row[0]},{row[2]}" for row in rows) + "\n")
    protein = write_fasta(tmp_path / "wild.fasta", [WILD])
    found = figures(models[0], "--assay", short, "--wild-type", protein)["assays"]["short"]
    assert found == figures(models[0], "--assay", whole)["assays"]["whole"]


def test_causal_models_have_likelihoods(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "llama")
    esm_tokenizer(tmp_path / "llama").save_pretrained(tmp_path / "llama")
    assay = write_assay(tmp_path / "A.csv", 6)
    found = figures(tmp_path / "llama", "--assay", assay)
    assert list(found["mean"]) == ["likelihood"]
    done = run("eval", "dms", tmp_path / "llama", "--assay", assay, "--score", "pll")
    assert done.exit_code == 1
    assert "cannot give pll, only likelihood" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing option '--assay'"),
        (["--assay", "A.csv", "--plot"], 2, "--plot writes to --output, which is missing"),
        (["--assay", "missing.csv"], 1, "cannot read missing.csv: No such file"),
        (["--assay", "A.csv", "--assay", "again/A.csv"], 1, "two assays are called A"),
        (["--assay", "empty"], 1, "empty holds no .csv file"),
        (["--assay", "A.csv", "--score-column", "fitness"], 1, "has no column fitness"),
        (["--assay", "A.csv", "--score", "likelihood"], 1, "cannot give likelihood"),
        (["--assay", "A.csv", "--window", "4"], 2, "4 is not in the range x>=8"),
    ],
)
def test_wrong_use(
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    write_assay(tmp_path / "A.csv", 3)
    for name in ("again", "empty"):
        (tmp_path / name).mkdir()
    write_assay(tmp_path / "again" / "A.csv", 3)
    monkeypatch.chdir(tmp_path)
    done = run("eval", "dms", models[0], *arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
