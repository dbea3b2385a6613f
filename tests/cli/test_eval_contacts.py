"""``rotq eval contacts``: its inputs, its figures, and what it refuses before a model is loaded."""

import importlib.util
import json
from pathlib import Path

import gemmi
import pytest
import torch
from click.testing import CliRunner, Result
from tiny_models import tiny_model
from tiny_proteins import esm_tokenizer, sequences, write_fasta

from rotq.cli.main import main

PROTEINS = sequences(3, shortest=30, longest=40)


def run(*arguments: str | Path) -> Result:
    arguments = ("eval", "contacts", *arguments)
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="rotq")


@pytest.fixture(scope="module", params=["esm", "bert"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, dtype=torch.float32).save_pretrained(folder)
    esm_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def esm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    tiny_model("esm", dtype=torch.float32, seed=1).save_pretrained(folder)
    esm_tokenizer(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fasta(tmp_path_factory.mktemp("fasta") / "p.fasta", PROTEINS)


def pdb(file: Path, sequence: str) -> Path:
    """Residues on a line that folds back, so that its ends are in contact."""
    structure = gemmi.Structure()
    structure.add_model(gemmi.Model(1))
    chain = gemmi.Chain("A")
    for number, letter in enumerate(sequence):
        residue = gemmi.Residue()
        residue.name = gemmi.expand_one_letter(letter, gemmi.ResidueKind.AA)
        residue.seqid = gemmi.SeqId(number + 1, " ")
        atom = gemmi.Atom()
        atom.name, atom.element = "CA", gemmi.Element("C")
        back = number >= len(sequence) // 2
        along = len(sequence) - 1 - number if back else number
        atom.pos = gemmi.Position(3.8 * along, 5.0 * back, 0)
        residue.add_atom(atom)
        chain.add_residue(residue)
    structure[0].add_chain(chain)
    structure.setup_entities()
    file.write_text(structure.make_pdb_string())
    return file


def test_structures_of_a_folder_and_a_reference(model: Path, tmp_path: Path) -> None:
    for number, protein in enumerate(PROTEINS):
        pdb(tmp_path / f"s{number}.pdb", protein)
    readout = ["--readout", "average"]
    done = run(model, "--structure", tmp_path, "--reference", model, "--json", *readout)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert list(report["proteins"]) == ["s0", "s1", "s2"]
    assert report["mean"]["agreement"] == {
        "overlap": 1,
        "correlation": pytest.approx(1),
    }
    long = report["mean"]["model"]["long"]
    assert 0 <= long["P@L"] < 1
    assert report["mean"]["model"] == report["mean"]["reference"]
    table = run(model, "--structure", tmp_path / "s0.pdb", "--chain", "A", *readout).stdout
    assert "P@L, P@L/5" in " ".join(table.split())
    assert "readout" in table


def test_a_list_of_contacts_and_proteins_alone(esm: Path, fasta: Path, tmp_path: Path) -> None:
    (tmp_path / "native.rr").write_text("1 30\n2 29\n3 12\n")
    done = run(esm, "--contacts", tmp_path / "native.rr", "--fasta", fasta, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["proteins"]["native.rr"]["model"]
    assert found["short"]["P@L"] is not None
    assert found["medium"]["P@L"] is None
    done = run(esm, "--fasta", fasta, "--reference", esm)
    assert done.exit_code == 0, done.output
    assert "100.00% of the reference's top L" in " ".join(done.stdout.split())


def test_long_proteins_are_left_out_by_name(esm: Path, fasta: Path) -> None:
    lengths = sorted(map(len, PROTEINS))
    done = run(esm, "--fasta", fasta, "--reference", esm, "--max-length", str(lengths[1]), "--json")
    assert "left out, longer than" in done.stderr
    assert len(json.loads(done.stdout)["proteins"]) < 3
    done = run(esm, "--fasta", fasta, "--reference", esm, "--max-length", "8")
    assert done.exit_code == 1
    assert "every protein is longer than 8 residues: s0, s1, s2" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ([], "give --structure or --contacts, or --fasta with --reference", 2),
        (["--fasta", "p.fasta"], "give --structure or --contacts", 2),
        (["--structure", "a.pdb", "--contacts", "b"], "give either --structure or --contacts", 2),
        (["--structure", "a.pdb", "--fasta", "b.fasta"], "--structure has its sequence", 2),
        (["--contacts", "b", "--fasta", "b.fasta", "--chain", "A"], "--chain is of a --stru", 2),
        (["--structure", "none.pdb"], "cannot read none.pdb", 1),
    ],
)
def test_what_is_refused(esm: Path, arguments: list[str], message: str, code: int) -> None:
    done = run(esm, *arguments)
    assert done.exit_code == code
    assert message in done.stderr


def test_two_of_one_name_and_an_empty_folder(esm: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pdb(tmp_path / name / "x.pdb", PROTEINS[0])
    done = run(esm, "--structure", tmp_path / "a", "--structure", tmp_path / "b")
    assert "two proteins are called x" in done.stderr
    done = run(esm, "--structure", tmp_path)
    assert f"{tmp_path} holds no structure" in done.stderr


def test_without_gemmi(esm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = run(esm, "--structure", pdb(tmp_path / "x.pdb", PROTEINS[0]))
    assert done.exit_code == 1
    assert "pip install 'rotq[structures]'" in done.stderr
