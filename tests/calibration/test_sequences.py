"""Proteins as they are found: FASTA with its oddities, alignments, PIR, tables, lists, packed."""

import bz2
import gzip
import io
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from rotq.calibration.sequences import holds_proteins, parse_proteins, read_proteins
from rotq.calibration.texts import read_text
from rotq.errors import RotqError

PLAIN = b">sp|P1|A_X first protein\nMKT\nayiA\n\n; a comment\n>b\nGG XU\n"


def found(data: bytes) -> list[tuple[str, str]]:
    return [(record.name, record.sequence) for record in parse_proteins("f", data).records]


def test_lines_are_joined_and_letters_raised() -> None:
    assert found(PLAIN) == [("sp|P1|A_X", "MKTAYIA"), ("b", "GGXU")]
    assert parse_proteins("f", PLAIN).records[0].description == "first protein"


def test_line_ends_of_windows() -> None:
    assert found(PLAIN.replace(b"\n", b"\r\n")) == found(PLAIN)


def test_gaps_and_the_last_stop_go() -> None:
    assert found(b">a\nMK--T.A*\n>b\nACD**\n") == [("a", "MKTA"), ("b", "ACD")]


def test_rare_and_unknown_letters_stay() -> None:
    assert found(b">a\nMXBZUOJ\n") == [("a", "MXBZUOJ")]


def test_what_is_left_out_is_counted() -> None:
    proteins = parse_proteins("f", b">a\nMKT\n>empty\n>gaps\n---\n>stop\nMK*T\n>last\n")
    assert [record.name for record in proteins.records] == ["a"]
    assert (proteins.num_empty, proteins.num_stops) == (3, 1)
    assert proteins.describe() == "1 sequences, 3 residues; left out: 3 empty, 1 with stops"
    assert "left out" not in parse_proteins("f", PLAIN).describe()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"MKT\n>a\nM\n", r"text f is neither FASTA \(it does not .* list .*: line 2 holds '>'"),
        (b">a\nMK1T\n", "f: record a holds '1'"),
        (b">\nMK?T\n", r"f: record \(no name\) holds '\?'"),
        (b">a\n>b\n*\n", "f holds no protein sequence"),
        (b"", "f holds no protein sequence"),
    ],
)
def test_what_is_no_protein_is_named(data: bytes, message: str) -> None:
    with pytest.raises(RotqError, match=message):
        parse_proteins("f", data)


def test_gzip_is_known_by_its_bytes(tmp_path: Path) -> None:
    for name in ("a.fasta.gz", "b.fa"):
        (tmp_path / name).write_bytes(gzip.compress(PLAIN))
        assert read_proteins(tmp_path / name).records == parse_proteins("f", PLAIN).records
        text = read_text(str(tmp_path / name))
        assert text.content == "MKTAYIA\nGGXU"
        assert [record.name for record in text.records] == ["sp|P1|A_X", "b"]


def test_damaged_gzip_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a.fasta.gz").write_bytes(gzip.compress(PLAIN)[:-9])
    with pytest.raises(RotqError, match=r"a\.fasta\.gz: damaged gzip file"):
        read_proteins(tmp_path / "a.fasta.gz")
    with pytest.raises(RotqError, match=r"cannot read .*b\.fasta: No such file"):
        read_proteins(tmp_path / "b.fasta")
    with pytest.raises(RotqError, match=r"b\.fasta\.gz: no such file"):
        read_text("b.fasta.gz")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_marks_and_line_ends(encoding: str, end: bytes) -> None:
    data = PLAIN.replace(b"\n", end).decode().encode(encoding)
    proteins = parse_proteins("f", data)
    assert proteins == parse_proteins("f", PLAIN)
    assert proteins.is_utf8


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_a_header_ends_where_its_line_does(mark: str) -> None:
    (record,) = parse_proteins("f", f">a binds{mark}at night\nMKTAYI\n".encode()).records
    assert (record.name, record.sequence) == ("a", "MKTAYI")
    assert record.description == f"binds{mark}at night"


def test_headers_of_older_databases_are_latin_1() -> None:
    proteins = parse_proteins("f", b">a prot\xe9ine\x85\nMKT\n>b\nGG\n")
    assert proteins.records[0].description == "protéine"
    assert proteins.records[1].sequence == "GG"
    assert proteins.describe() == "2 sequences, 5 residues; headers are not UTF-8, read as Latin-1"
    with pytest.raises(RotqError, match="f: record a holds 'é'"):
        parse_proteins("f", b">a\nMK\xe9T\n")


def test_no_letter_is_made_two() -> None:
    # upper() of these are residues
    for letter in ("\u00df", "\u0131", "\u017f", "\ufb01", "\u212a"):
        with pytest.raises(RotqError, match="f: record a holds"):
            parse_proteins("f", f">a\nMK{letter}T\n".encode())


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
        parse_proteins("f", b">a\n>b\nM*K\n")


def test_joined_and_zipped_files_are_one() -> None:
    parts = [b"\xef\xbb\xbf>a\r\nMKT\r\n", b"\xef\xbb\xbf>b\nGG\n"]
    for data in (b"".join(parts), b"".join(map(gzip.compress, parts))):
        assert found(data) == [("a", "MKT"), ("b", "GG")]


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(RotqError, match=f"cannot read {tmp_path}: Is a directory"):
        read_proteins(tmp_path)
    with pytest.raises(RotqError, match="/dev/zero is a pipe, a socket or a device"):
        read_proteins(Path("/dev/zero"))


def test_endings() -> None:
    assert all(map(holds_proteins, ("a.fasta", "A.FA.GZ", "x/y.faa", "z.fas.bz2", "b.a3m.zst")))
    assert not any(map(holds_proteins, ("a.txt", "fasta", "a.gz", "a.jsonl.gz", "a.csv")))


def zstd(data: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
    return packed.getvalue().to_pybytes()


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_whatever_packed_it(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a.fasta").write_bytes(pack(PLAIN))
    assert read_proteins(tmp_path / "a.fasta").records == parse_proteins("f", PLAIN).records


def test_standard_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(PLAIN))))
    assert read_proteins(Path("-")).records == parse_proteins("f", PLAIN).records
    (tmp_path / "-").write_text("MKT\n")
    assert [record.sequence for record in read_proteins(Path("-")).records] == ["MKT"]


A3M = b"""#7\t1
>query
MKT-AYI
>ss_pred SSPro
CCHHHEE
>UniRef100_A hit
MkkT-AYIxx
\0>second
GG
"""


def test_an_alignment_loses_gaps_and_keeps_insertions() -> None:
    found = parse_proteins("x.a3m", A3M).records
    assert [(r.name, r.sequence) for r in found] == [
        ("query", "MKTAYI"),
        ("UniRef100_A", "MKKTAYIXX"),
        ("second", "GG"),
    ]


PIR = b""">P1;CRAB_ANAPL
ALPHA CRYSTALLIN B CHAIN
  MDITIHNPLI RRPLFSW
  LAPSRIFD*
C;a comment

>F1;1abc
structureX:1abc:1:A
GG--K*
"""


@pytest.mark.parametrize("name", ["a.pir", "a.ali.gz", "a.fasta", "-"])
def test_descriptions_of_pir_are_no_residues(name: str) -> None:
    found = parse_proteins(name, PIR).records
    assert [(r.name, r.sequence) for r in found] == [
        ("CRAB_ANAPL", "MDITIHNPLIRRPLFSWLAPSRIFD"),
        ("1abc", "GGK"),
    ]
    assert found[0].description == "ALPHA CRYSTALLIN B CHAIN"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b">P1;a\nx\nMK*\n>b\nMK\n", "f.pir, line 4: '>b' is no header of PIR"),
        (b">DL;a\nx\nACGT*\n", "f.pir: entry a is of type DL, no protein"),
        (b"MKT\n", "f.pir is not PIR"),
        (b">P1;a\nx\nM1K*\n", "f.pir: record a holds '1'"),
    ],
)
def test_what_is_no_pir(data: bytes, message: str) -> None:
    with pytest.raises(RotqError, match=message):
        parse_proteins("f.pir", data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"id,Sequence,x\np one,MKT,1\np/2,g-g*,2\n"),
        ("a.csv.gz", gzip.compress(b'x;seq;NAME\n"1;2";MKT;p one\n3;GG;p/2\n')),
        ("a.tsv", b"Entry\tLength\tSequence\r\np one\t3\tMKT\r\np/2\t2\tGG\r\n"),
    ],
    ids=["csv", "zipped", "tsv"],  # gzip has the time in it
)
def test_tables_by_their_columns(name: str, data: bytes) -> None:
    found = parse_proteins(name, data).records
    assert [(r.name, r.sequence) for r in found] == [("p one", "MKT"), ("p/2", "GG")]


def test_a_table_without_sequences_says_what_it_has() -> None:
    with pytest.raises(RotqError, match=r"a\.csv has no column sequence or seq.*; it has id, dna"):
        parse_proteins("a.csv", b"id,dna\na,ACG\n")
    assert parse_proteins("a.csv", b"seq\nMKT\nGG\n").records[1].name == "2"
    with pytest.raises(RotqError, match=r"a\.csv: record a holds '1'"):
        parse_proteins("a.csv", b"id,seq\na,M1K\n")


def test_a_list_is_called_by_numbers() -> None:
    found = parse_proteins("a.txt", b"# peptides\nMKT\n\n  ggA*\n").records
    assert [(r.name, r.sequence) for r in found] == [("1", "MKT"), ("2", "GGA")]


def test_a_wrapped_sequence_is_no_list() -> None:
    wrapped = b"\n".join([b"M" * 60, b"K" * 60, b"GG"])
    with pytest.raises(RotqError, match="looks like one sequence on lines of 60"):
        parse_proteins("a.txt", wrapped)
    whole = parse_proteins("a.txt", b"\n".join([b"M" * 60, b"K" * 60])).records
    assert len(whole) == 2


def test_prose_is_no_list() -> None:
    with pytest.raises(RotqError, match="nor a list of sequences: line 1 holds ' '"):
        parse_proteins("a.txt", b"Hello world\n")
