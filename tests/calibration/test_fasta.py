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


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_marks_and_line_ends(encoding: str, end: bytes) -> None:
    data = PLAIN.replace(b"\n", end).decode().encode(encoding)
    proteins = parse_fasta("f", data)
    assert proteins == parse_fasta("f", PLAIN)
    assert proteins.is_utf8


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_a_header_ends_where_its_line_does(mark: str) -> None:
    (record,) = parse_fasta("f", f">a binds{mark}at night\nMKTAYI\n".encode()).records
    assert (record.name, record.sequence) == ("a", "MKTAYI")
    assert record.description == f"binds{mark}at night"


def test_headers_of_older_databases_are_latin_1() -> None:
    proteins = parse_fasta("f", b">a prot\xe9ine\x85\nMKT\n>b\nGG\n")
    assert proteins.records[0].description == "protéine"
    assert proteins.records[1].sequence == "GG"
    assert proteins.describe() == "2 sequences, 5 residues; headers are not UTF-8, read as Latin-1"
    with pytest.raises(RotqError, match="f: record a holds 'é'"):
        parse_fasta("f", b">a\nMK\xe9T\n")


def test_no_letter_is_made_two() -> None:
    # upper() of these are residues
    for letter in ("\u00df", "\u0131", "\u017f", "\ufb01", "\u212a"):
        with pytest.raises(RotqError, match="f: record a holds"):
            parse_fasta("f", f">a\nMK{letter}T\n".encode())


def test_names_may_be_missing_and_be_the_same() -> None:
    assert found(b">\nMKT\n>a\nGG\n>a\nGG\n> b c\nM\n>d\te f\nM") == [
        ("", "MKT"),
        ("a", "GG"),
        ("a", "GG"),
        ("b", "M"),
        ("d", "M"),
    ]


def test_spaces_and_comments_anywhere() -> None:
    data = b"; made by hand\n\n  >a\n  MK TA\tYI\n;MKT\n  ; MKT\n\n\nGG\n\n"
    assert found(data) == [("a", "MKTAYIGG")]


def test_a_file_without_a_protein_says_what_it_had() -> None:
    with pytest.raises(RotqError, match="f holds no protein sequence; left out: 1 empty, 1 with"):
        parse_fasta("f", b">a\n>b\nM*K\n")


def test_joined_and_zipped_files_are_one() -> None:
    parts = [b"\xef\xbb\xbf>a\r\nMKT\r\n", b"\xef\xbb\xbf>b\nGG\n"]
    for data in (b"".join(parts), b"".join(map(gzip.compress, parts))):
        assert found(data) == [("a", "MKT"), ("b", "GG")]


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RotqError, match=f"cannot read {tmp_path}: Is a directory"):
        read_fasta(tmp_path)
    with pytest.raises(RotqError, match="/dev/zero is a pipe, a socket or a device"):
        read_fasta(Path("/dev/zero"))


def test_endings() -> None:
    assert all(map(is_fasta, ("a.fasta", "A.FA.GZ", "x/y.faa", "z.fas.gz")))
    assert not any(map(is_fasta, ("a.txt", "fasta", "a.gz", "a.jsonl.gz")))
