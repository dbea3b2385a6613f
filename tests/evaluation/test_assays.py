"""Reading assays: ProteinGym's form, and what is refused by row."""

import gzip
from pathlib import Path

import pytest

from rotq.errors import RotqError
from rotq.evaluation.assays import Substitution, read_assay

ROWS = """mutant,mutated_sequence,DMS_score,DMS_score_bin
A2G,MGKT,0.5,1
M1L:T4S,LAKS,-1.25,0
"""


def write(folder: Path, content: str) -> Path:
    file = folder / "BLAT.csv"
    file.write_text(content, encoding="utf-8")
    return file


def test_the_wild_type_is_what_stands_behind_the_mutations(tmp_path: Path) -> None:
    found = read_assay(write(tmp_path, ROWS))
    assert found.name == "BLAT"
    assert found.wild_type == "MAKT"
    assert found.scores == (0.5, -1.25)
    assert found.substitutions[1] == (Substitution("M", 0, "L"), Substitution("T", 3, "S"))
    assert [found.sequence(i) for i in (0, 1)] == ["MGKT", "LAKS"]
    assert found.first(1).mutants == ("A2G",)
    assert found.first(0) == found


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "marked"])
def test_as_spreadsheets_write_it(tmp_path: Path, line_end: str, mark: str) -> None:
    file = tmp_path / "BLAT.csv.gz"
    quoted = ROWS.replace("A2G", '"a2g"').replace("\n", line_end)
    file.write_bytes(gzip.compress((mark + quoted).encode()))
    assert read_assay(file).substitutions[0] == (Substitution("A", 1, "G"),)
    assert read_assay(file).name == "BLAT"


def test_without_sequences_the_wild_type_is_given(tmp_path: Path) -> None:
    file = write(tmp_path, "mutant,fitness\nA2G,1\nWT,2\n,3\n")
    found = read_assay(file, score="fitness", wild_type="MAKT")
    assert found.substitutions == ((Substitution("A", 1, "G"),), (), ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mutant,DMS_score\nA2G,1\n", "has no column mutated_sequence; it has mutant, DMS_score"),
        ("mutant,mutated_sequence,DMS_score\n", "holds no variant"),
        ("", "has no column mutant, DMS_score, mutated_sequence"),
        (ROWS + "A2,MAKT,1,1\n", "line 4: 'A2' is no substitution such as A23G"),
        (ROWS + "A0G,MAKT,1,1\n", "line 4: 'A0G' is no substitution"),
        (ROWS + "A2G:A2S,MSKT,1,1\n", "line 4: 'A2G:A2S' changes one position twice"),
        (ROWS + "A2C,MGKT,1,1\n", "line 4: mutated_sequence does not have its mutations"),
        (ROWS + "T9C,MGKT,1,1\n", "line 4: mutated_sequence does not have its mutations"),
        (ROWS + "A2C,MCKW,1,1\n", "line 4: not a variant of the protein of line 2"),
        (ROWS + "A2C,MCKT,,1\n", "line 4: the score '' is no number"),
        (ROWS + "A2C,MCKT,nan,1\n", "line 4: the score 'nan' is no number"),
        (ROWS + '"A2C,MCKT\n', "line 3: unexpected end of data"),
        (ROWS + "A2C\n", "line 4: mutated_sequence does not have its mutations"),
    ],
)
def test_what_is_wrong_is_named_by_its_row(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(RotqError, match=rf"BLAT.csv(, |\s)(.*){message}"):
        read_assay(write(tmp_path, content))


@pytest.mark.parametrize(
    ("mutant", "message"),
    [("K2G", "K2, but the wild type has A there"), ("A7G", "A7, but .* has its end before it")],
)
def test_mutations_of_another_protein(tmp_path: Path, mutant: str, message: str) -> None:
    file = write(tmp_path, f"mutant,DMS_score\n{mutant},1\n")
    with pytest.raises(RotqError, match=f"line 2: {message}"):
        read_assay(file, wild_type="MAKT")
