"""FASTA as it is found: compressed, wrapped, lower case, with gaps, stops and strangers."""

import gzip
from pathlib import Path

import pytest

from rotq.calibration.fasta import is_fasta, parse_fasta, read_fasta
from rotq.calibration.texts import read_text
from rotq.errors import RotqError

PLAIN = b">sp|P1|A_X first protein\nMKT\nayiA\n\n; a comment\n>b\nGG XU\n"


def found(data: bytes) -> list[tuple[str, str]]:
    return [(record.name, record.sequence) for record in parse_fasta("f", data).records]


def test_lines_are_joined_and_letters_raised() -> None:
    assert found(PLAIN) == [("sp|P1|A_X", "MKTAYIA"), ("b", "GGXU")]
    assert parse_fasta("f", PLAIN).records[0].description == "first protein"


def test_line_ends_of_windows() -> None:
    assert found(PLAIN.replace(b"\n", b"\r\n")) == found(PLAIN)


def test_gaps_and_the_last_stop_go() -> None:
    assert found(b">a\nMK--T.A*\n>b\nACD**\n") == [("a", "MKTA"), ("b", "ACD")]


def test_rare_and_unknown_letters_stay() -> None:
    assert found(b">a\nMXBZUOJ\n") == [("a", "MXBZUOJ")]


def test_what_is_left_out_is_counted() -> None:
    proteins = parse_fasta("f", b">a\nMKT\n>empty\n>gaps\n---\n>stop\nMK*T\n>last\n")
    assert [record.name for record in proteins.records] == ["a"]
    assert (proteins.num_empty, proteins.num_stops) == (3, 1)
    assert proteins.describe() == "1 sequences, 3 residues; left out: 3 empty, 1 with stops"
    assert "left out" not in parse_fasta("f", PLAIN).describe()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"MKT\n>a\nM\n", "text f is not FASTA: it does not start with a > header"),
        (b">a\nMK1T\n", "f: record a holds '1'"),
        (b">\nMK?T\n", r"f: record \(no name\) holds '\?'"),
        (b">a\n>b\n*\n", "f holds no protein sequence"),
        (b"", "f holds no protein sequence"),
    ],
)
def test_what_is_no_protein_is_named(data: bytes, message: str) -> None:
    with pytest.raises(RotqError, match=message):
        parse_fasta("f", data)


def test_gzip_is_known_by_its_bytes(tmp_path: Path) -> None:
    for name in ("a.fasta.gz", "b.fa"):
        (tmp_path / name).write_bytes(gzip.compress(PLAIN))
        assert read_fasta(tmp_path / name).records == parse_fasta("f", PLAIN).records
        text = read_text(str(tmp_path / name))
        assert text.content == "MKTAYIA\nGGXU"
        assert [record.name for record in text.records] == ["sp|P1|A_X", "b"]


def test_damaged_gzip_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a.fasta.gz").write_bytes(gzip.compress(PLAIN)[:-9])
    with pytest.raises(RotqError, match=r"a\.fasta\.gz: damaged gzip file"):
        read_fasta(tmp_path / "a.fasta.gz")
    with pytest.raises(RotqError, match=r"cannot read .*b\.fasta: No such file"):
        read_fasta(tmp_path / "b.fasta")
    with pytest.raises(RotqError, match=r"b\.fasta\.gz: no such file"):
        read_text("b.fasta.gz")


def test_endings() -> None:
    assert all(map(is_fasta, ("a.fasta", "A.FA.GZ", "x/y.faa", "z.fas.gz")))
    assert not any(map(is_fasta, ("a.txt", "fasta", "a.gz", "a.jsonl.gz")))
