"""Texts by name: files, corpora, data sets, and what is wrong with them."""

import json
import re
from pathlib import Path

import pytest

from rotq.calibration.texts import HELD_OUT_TOPICS, read_text
from rotq.errors import RotqError


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
    with pytest.raises(RotqError, match='no column "text", only body'):
        read_text(str(folder))


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
