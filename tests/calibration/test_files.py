"""Bytes of a file to text: marks, encodings, line ends, compression, and what is no file."""

import bz2
import codecs
import gzip
import lzma
import os
import socket
from pathlib import Path

import pyarrow
import pytest

import rotq.calibration.files as files
from rotq.calibration.files import decode, decompress, find_path, read_stored
from rotq.errors import RotqError

TEXT = "Zeile eins, größer\nzwei\n\nvier € 😀\n"
MARKED = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_mark_says_the_encoding_and_is_no_text(encoding: str, end: str) -> None:
    data = MARKED[encoding] + TEXT.replace("\n", end).encode(encoding)
    assert decode("f", data) == (TEXT, True)


def test_without_a_mark_it_is_utf8() -> None:
    assert decode("f", TEXT.encode()) == (TEXT, True)
    assert decode("f", b"") == ("", True)


def test_nothing_else_ends_a_line() -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
    assert decode("f", text.encode()).content == text


def test_marks_between_joined_files_go_too() -> None:
    joined = "\ufeffone\r\n\ufefftwo\n\ufeff\nthree\ufeff3"
    assert decode("f", codecs.BOM_UTF8 + joined.encode()).content == "one\ntwo\n\nthree\ufeff3"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ab\r\nc\xe9d", r"text f is not UTF-8: byte 0xe9 at offset 5, line 2; convert it"),
        (b"\xef\xbb\xbfa\rb\xff", r"not UTF-8: byte 0xff at offset 6, line 2"),
        # half a character, as UTF-8 never has it
        ("a\n\ud83d".encode("utf-8", "surrogatepass"), r"not UTF-8: byte 0xed at offset 2, line 2"),
        (b"\xff\xfea\x00\n\x00\x3d\xd8", r"not UTF-16: byte 0x3d at offset 6, line 2"),
        (b"\xff\xfea\x00b", r"not UTF-16: byte 0x62 at offset 4, line 1"),
        ("UTF-16 without a mark".encode("utf-16-le"), r"full of NULs: no text, or UTF-16 without"),
    ],
)
def test_what_is_in_another_encoding_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(RotqError, match=message):
        decode("f", data)


def test_latin_1_only_where_it_is_asked_for_and_utf8_fails() -> None:
    assert decode("f", b"caf\xe9\r\x85", latin=True) == ("café\n\x85", False)
    assert decode("f", "café".encode(), latin=True) == ("café", True)
    with pytest.raises(RotqError, match="not UTF-16"):
        decode("f", b"\xff\xfea\x00b", latin=True)


def zstd(data: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(data)
    return packed.getvalue().to_pybytes()


PACKERS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd}


@pytest.mark.parametrize("kind", PACKERS)
def test_several_members_are_one_file(kind: str) -> None:
    pack = PACKERS[kind]
    assert decompress("f", pack(b"one\n") + pack(b"") + pack(b"two\n")) == b"one\ntwo\n"
    assert decompress("f", b"plain") == b"plain"


@pytest.mark.parametrize("cut", [slice(0, 10), slice(0, 15), slice(0, -1)])
@pytest.mark.parametrize("kind", PACKERS)
def test_damaged_files(kind: str, cut: slice) -> None:
    with pytest.raises(RotqError, match=f"f: damaged {kind} file"):
        decompress("f", PACKERS[kind](b"some text of some length")[cut])


def test_names_without_what_packed_them() -> None:
    names = ("A.CSV.GZ", "a.csv", "a.csv.zst", "a.csv.bz2", "a.csv.xz", ".gz", "a.gz.gz")
    found = [files.unpacked_name(name) for name in names]
    assert found == ["a.csv"] * 5 + ["", "a.gz"]


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("zip", b"PK\x03\x04\x14\x00"),
        ("Parquet", b"PAR1\x15\x04"),
    ],
)
def test_what_something_else_packed_is_named(kind: str, data: bytes) -> None:
    with pytest.raises(
        RotqError, match=f"f is a {kind} file; only gzip, .*, zstd are read: unpack it"
    ):
        decompress("f", data)


@pytest.mark.parametrize("text", [b"BZh9 is how bzip2 begins", b"PAR1A is a gene", b"PK"])
def test_texts_that_begin_alike(text: bytes) -> None:
    assert decompress("f", text) == text


def test_what_is_too_large_is_refused_before_it_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGEST", 1000)
    monkeypatch.setattr(files, "_PIECE", 100)
    (tmp_path / "f").write_bytes(b"x" * 1000)
    assert len(read_stored(tmp_path / "f", "text f")) == 1000
    (tmp_path / "f").write_bytes(b"x" * 1001)
    with pytest.raises(RotqError, match=r"text f: more than \d+ GiB of text; give a part"):
        read_stored(tmp_path / "f", "text f")
    with pytest.raises(RotqError, match=r"f: more than \d+ GiB of text"):
        decompress("f", gzip.compress(b"x" * 1001))


def test_files_and_folders_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_text("x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_path(str(tmp_path / "f")) == tmp_path / "f"
    assert find_path("~/f") == tmp_path / "f"
    assert find_path(str(tmp_path)) == tmp_path
    for missing in ("none", "f/g", "~nobody-of-that-name/f", "a\0b"):
        assert find_path(missing) is None
    assert find_path(str(tmp_path / "f" / "g")) is None


def test_pipes_sockets_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for source in (tmp_path / "pipe", tmp_path / "socket", Path("/dev/zero")):
            with pytest.raises(RotqError, match=f"text {source} is a pipe, a socket or a device"):
                find_path(str(source))


def test_standard_input_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RotqError, match=r"text - is a pipe.*: write it to a file"):
        find_path("-")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").write_text("x")
    assert find_path("-") == Path("-")


def test_paths_that_cannot_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RotqError, match="loop: Too many levels of symbolic links"):
        find_path(str(tmp_path / "loop"))
    with pytest.raises(RotqError, match="File name too long"):
        find_path("a" * 5000)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RotqError, match="text f: No such file"):
        read_stored(tmp_path / "f", "text f")
    with pytest.raises(RotqError, match="text f: Is a directory"):
        read_stored(tmp_path, "text f")
