"""``rotq eval decode``: rows by group and cache, and what is refused before a model is loaded."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_models import tiny_model
from tiny_proteins import esm_tokenizer, sequences, write_fasta

import rotq.checkpoint.load
from rotq.cli.main import main

CALIBRATION = ["--calibration-length", "40", "--num-samples", "4"]


def run(*arguments: str | Path) -> Result:
    arguments = ("eval", "decode", *arguments)
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="rotq")


def saved(folder: Path, name: str) -> Path:
    tiny_model(name, dtype=torch.float32).save_pretrained(folder)
    esm_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("esm"), "esm-wide")


@pytest.fixture(scope="module")
def proteins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = sequences(6, shortest=40, longest=60)
    return write_fasta(tmp_path_factory.mktemp("fasta") / "p.fasta", found)


def test_rows_of_groups_and_caches(model: Path, proteins: Path, tmp_path: Path) -> None:
    (tmp_path / "g.fasta").write_text(">a group=loops\nMKTAYIAKQR\n>b\nMKVLAAGIVGLLLA\n")
    common = [model, "--fasta", tmp_path / "g.fasta", "--kv", "k3v3,turboesm,int8,dense"]
    done = run(*common, "--calibration", proteins, *CALIBRATION, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["groups"]
    assert list(found) == ["loops", "g.fasta"]
    caches = [row["cache"] for row in found["loops"]]
    assert caches == ["dense", "k3v3", "turboesm", "int8"]
    by_cache = {row["cache"]: row for row in found["loops"]}
    assert by_cache["dense"]["ratio"] == 1
    assert 0.9 < by_cache["k3v3"]["cosine"] < by_cache["int8"]["cosine"] < 1
    assert by_cache["int8"]["tokens"] == 11


def test_the_papers_figures_stand_beside_its_groups(model: Path, proteins: Path) -> None:
    some = ["--sequences", "1", "--max-length", "12", "--calibration", proteins, *CALIBRATION]
    table = run(model, "--kv", "turboesm,int8", *some).stdout
    rows = [line.split() for line in table.splitlines()]
    turboesm = {row[0]: row[-1] for row in rows if row[1:2] == ["turboesm"]}
    assert turboesm == {
        "short-peptide": "0.9603",
        "transmembrane": "0.9710",
        "active-site": "0.9641",
        "disordered": "0.9757",
    }
    assert {row[-1] for row in rows if row[1:2] == ["int8"]} == {"-"}


def test_what_is_refused_before_a_model_is_loaded(
    model: Path, proteins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(rotq.checkpoint.load, "load_model", load)
    bert = saved(tmp_path / "bert", "bert")
    (tmp_path / "short.fasta").write_text(">a\nM\n")
    cases = [
        ([model, "--kv", "k3v3"], "these caches are calibrated; give --calibration", 2),
        ([model, "--kv", "k3v9"], "no KV preset 'k3v9'", 2),
        ([bert, "--kv", "int8"], "is no ESM-2 with rotary positions", 1),
        ([model, "--kv", "int8", "--fasta", tmp_path / "short.fasta"], "a sequence of one", 1),
        ([model, "--kv", "k3v3", "--calibration", proteins], "no protein has 126 residues", 1),
    ]
    for arguments, message, code in cases:
        done = run(*arguments)
        assert (done.exit_code, message in done.stderr) == (code, True), done.output
