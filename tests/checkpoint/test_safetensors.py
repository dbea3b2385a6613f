"""Headers of safetensors files that nobody sane has written."""

import struct
from pathlib import Path

import pytest

from rotq.checkpoint.files import LIMIT_BYTES, read_json
from rotq.checkpoint.safetensors import HEADER_LIMIT, read_entries
from rotq.errors import RotqError

DEEP = b"[" * 100_000 + b"]" * 100_000


def with_header(folder: Path, header: bytes) -> Path:
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder / "x.safetensors"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (DEEP, "header is not JSON"),
        (b'{"a": ' + DEEP + b"}", "header is not JSON"),
        (b"9" * 5000, "header is not JSON"),
        (b'{"\xe9": 1}', "header is not JSON"),
        (b'{"a": null}', "entry for a is not valid"),
        (b'{"a": {"dtype": 3, "shape": [], "data_offsets": [0, 0]}}', "entry for a is not valid"),
        (b'{"a": {"dtype": "F32", "shape": [1e9], "data_offsets": [0, 0]}}', "does not add up"),
        (b'{"a": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 0]}}', "is not valid"),
        (b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [8, 0]}}', "does not add up"),
    ],
)
def test_headers_are_refused_in_one_line(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(RotqError, match=message) as caught:
        read_entries(with_header(tmp_path, header))
    assert str(tmp_path / "x.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", HEADER_LIMIT + 1))
        handle.truncate(HEADER_LIMIT + 9)
    with pytest.raises(RotqError, match="is not a safetensors file"):
        read_entries(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "is not JSON"),
        (b'{"a": ' + DEEP + b"}", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b"3", "is not a JSON object"),
    ],
)
def test_json_files_are_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RotqError, match=rf"config\.json {message}"):
        read_json(tmp_path / "config.json")


def test_a_json_file_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as handle:
        handle.truncate(LIMIT_BYTES + 1)
    with pytest.raises(RotqError, match=f"larger than {LIMIT_BYTES} bytes"):
        read_json(tmp_path / "config.json")
