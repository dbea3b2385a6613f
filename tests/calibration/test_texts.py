"""Texts by name: files, corpora, data sets, and what is wrong with them."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

from rotq.calibration.texts import HELD_OUT_TOPICS, read_text
from rotq.errors import RotqError


class PanicException(BaseException):
    """As native code's panics come to Python."""


def test_bad_byte_is_named_with_its_offset(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(RotqError, match=r"not UTF-8: byte 0xe9 at offset 3"):
        read_text(str(file))


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_text(tmp_path: Path, content: str) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(content)
    with pytest.raises(RotqError, match="is empty"):
        read_text(str(file))


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "~/missing/file"])
def test_missing_file(source: str) -> None:
    with pytest.raises(RotqError, match=f"{re.escape(source)}: no such file"):
        read_text(source)


def test_line_ends_are_those_of_text_mode(tmp_path: Path) -> None:
    file = tmp_path / "dos.txt"
    file.write_bytes(b"one\r\ntwo\rthree\n")
    assert read_text(str(file)).content == "one\ntwo\nthree\n"


def test_jsonl_takes_the_text_field(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    lines = [json.dumps({"text": t, "id": i}) for i, t in enumerate(["a\u2028b", "second"])]
    file.write_text("\n".join([*lines, "", ""]), encoding="utf-8")
    assert read_text(str(file)).content == "a\u2028b\n\nsecond"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"body": "x"}', 'line 2: no string field "text"'),
        ("[]", "line 2"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(RotqError, match=message):
        read_text(str(file))


BODY = "First line, größer.\nSecond line\u2028still the second.\n"


def stored(content: str) -> dict[str, bytes]:
    """The same text as programs on several systems write it."""
    dos = content.replace("\n", "\r\n")
    return {
        "plain": content.encode(),
        "marked": content.encode("utf-8-sig"),
        "windows": dos.encode("utf-8-sig"),
        "notepad": dos.encode("utf-16"),
        "mac": content.replace("\n", "\r").encode(),
        "joined": ("\ufeff" + content).encode("utf-8-sig"),
        "zipped": gzip.compress(dos.encode("utf-8-sig")),
    }


@pytest.mark.parametrize(
    "ending", [".txt", "", ".txt.gz", ".jsonl", ".ndjson", ".json", ".JSONL.gz"]
)
@pytest.mark.parametrize("how", stored(""))
def test_a_text_is_the_same_however_it_is_stored(tmp_path: Path, ending: str, how: str) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in (BODY, "more")]
    content = "\n".join([*lines, ""]) if "json" in ending.lower() else BODY
    file = tmp_path / f"text{ending}"
    file.write_bytes(stored(content)[how])
    text = read_text(str(file))
    assert text.content == (f"{BODY}\n\nmore" if "json" in ending.lower() else BODY)
    assert text.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert text.note == ""


def test_json_lines_by_another_name_are_noted(tmp_path: Path) -> None:
    file = tmp_path / "records.txt"
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    text = read_text(str(file))
    assert text.content == file.read_text()
    assert (
        text.note
        == f"{file} looks like JSON lines and is read as plain text; .jsonl reads its records"
    )


@pytest.mark.parametrize(
    "content",
    [b"\xef\xbb\xbf", b"\xff\xfe\n\x00", gzip.compress(b"", mtime=0)],
    ids=["utf-8", "utf-16", "gzip"],
)
@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_nothing_but_a_mark_is_empty(tmp_path: Path, content: bytes, ending: str) -> None:
    file = tmp_path / f"empty{ending}"
    file.write_bytes(content)
    with pytest.raises(RotqError, match="is empty"):
        read_text(str(file))


def test_fasta_drops_headers_and_joins_lines(tmp_path: Path) -> None:
    file = tmp_path / "proteins.fasta"
    file.write_text(">first protein\nMKV\nLLA\n\n>second\n>third\nGG\n")
    assert read_text(str(file)).content == "MKVLLA\nGG"


def test_fasta_without_header(tmp_path: Path) -> None:
    file = tmp_path / "proteins.fa"
    file.write_text("MKV\n")
    with pytest.raises(RotqError, match="not FASTA"):
        read_text(str(file))


def test_data_set_by_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for split, text in (("train", "to train on"), ("test", "to test on")):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert read_text(str(folder)).content == "to train on"
    assert read_text(str(folder), split="test").content == "to test on"
    assert read_text(f"{folder}:test").content == "to test on"


def test_data_set_without_text_column(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(RotqError, match='no column "text" or "messages", only body'):
        read_text(str(folder))


def data_set(folder: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> str:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "train.jsonl").write_bytes(content)
    return str(corpus)


def test_a_folder_that_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = data_set(tmp_path, monkeypatch, b'{"text": "a"}\n{broken\n')
    message = f"text {source}: it is a folder, and datasets says: .+: .+"
    with pytest.raises(RotqError, match=message) as found:
        read_text(source)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 600


def test_the_folder_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.txt").write_text("words\nof\nmodel\n")
    with pytest.raises(RotqError, match="is the folder of a model; a file is needed"):
        read_text(str(tmp_path))


ERRORS = (KeyError("x"), TypeError("two\nlines"), ImportError("zstd"), PanicException())


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_datasets_raises_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)
    message = "text some/corpus: no such file, and datasets says: "
    with pytest.raises(RotqError, match=message) as found:
        read_text("some/corpus")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["fine", 5], 'row 1: no string field "text"'),
        ([None, ["a"]], 'row 1: no string field "text"'),
        (["fine", "", "half \ud83d"], r"row 2: half a character, \\ud83d"),
    ],
)
def test_rows_that_are_no_text(
    monkeypatch: pytest.MonkeyPatch, rows: list[object], message: str
) -> None:
    class Rows(dict[str, list[object]]):
        column_names = ("text",)

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows(text=rows))
    with pytest.raises(RotqError, match=message):
        read_text("some/corpus")


def test_unknown_data_set_offline() -> None:
    with pytest.raises(RotqError, match="nobody/nothing: no such file, and datasets says"):
        read_text("nobody/nothing")


def test_pydoc_and_its_held_out_part_share_hardly_a_phrase() -> None:
    def phrases(source: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", read_text(source).content.lower())
        return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}

    assert len(HELD_OUT_TOPICS) == 3
    held_out = phrases("pydoc-test")
    assert len(held_out) > 10_000
    assert len(held_out & phrases("pydoc")) <= 5
