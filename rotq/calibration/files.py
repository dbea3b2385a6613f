"""Files of text: found, read, unpacked and decoded, in one way for whoever reads one.

    compression     gzip, bzip2, xz and zstd, of any number of members, known by the first bytes
    encoding        UTF-8, or what a byte order mark says: UTF-8, UTF-16, UTF-32
    marks           are no text, at the start of a file or of a line (as where files were joined)
    line ends       \\n, \\r\\n and \\r become \\n; nothing else ends a line (U+2028, \\v, ...)

Other encodings cannot be told apart and are refused, except where they matter only to headers
(FASTA): what is not UTF-8 is Latin-1 there, which has a letter for every byte.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import stat
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from rotq.errors import RotqError

LARGEST = 2**30
"""Bytes of a file, as it is stored and unpacked."""

_MARK = "\ufeff"
_OTHERS = {
    "zip": re.compile(rb"PK\x03\x04"),
    "Parquet": re.compile(rb"PAR1\W"),
}
"""How files begin that hold a text and are none."""
_PIECE = 2**20


def _open_zstd(data: IO[bytes]) -> IO[bytes]:
    import pyarrow  # comes with datasets

    return pyarrow.CompressedInputStream(data, "zstd")


_PACKED: dict[str, tuple[re.Pattern[bytes], Callable[[IO[bytes]], Any]]] = {
    "gzip": (re.compile(rb"\x1f\x8b"), lambda data: gzip.GzipFile(fileobj=data)),
    "bzip2": (re.compile(rb"BZh[1-9]1AY&SY"), bz2.BZ2File),
    "xz": (re.compile(rb"\xfd7zXZ\0"), lzma.LZMAFile),
    "zstd": (re.compile(rb"\x28\xb5\x2f\xfd"), _open_zstd),
}
"""How packed files begin, and what opens them."""
_PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
_LATIN = "latin-1"
_ENCODINGS = (
    # first those that begin like others
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (b"", "utf-8"),
)


class Decoded(NamedTuple):
    """Text of a file."""

    content: str
    """Without marks, its lines ended by \\n."""
    is_utf8: bool
    """It was in UTF-8, or in what its mark said; else it was read as Latin-1."""


def find_path(source: str) -> Path | None:
    """The file or folder of that name; None where there is nothing.

    Raises:
        RotqError: a pipe, a socket or a device, as which "-" counts; or it cannot be looked at.
    """
    try:
        path = Path(source).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if source == "-":
            raise _no_file(source) from None
        return None
    except (RuntimeError, ValueError):  # a home of nobody, a name with a NUL
        return None
    except OSError as error:
        raise RotqError(f"text {source[:200]}: {error.strerror}") from None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return path
    raise _no_file(source)


def read_stored(path: Path, refusal: str) -> bytes:
    """The bytes of a file as they are stored.

    Args:
        path: Of the file.
        refusal: How the message of an error begins.

    Raises:
        RotqError: it cannot be read, or has more than ``LARGEST`` bytes.
    """
    try:
        with path.open("rb") as file:
            return _read(file, refusal)
    except OSError as error:
        raise RotqError(f"{refusal}: {error.strerror or error}") from None


def read_given(path: Path, refusal: str) -> bytes:
    """As ``read_stored``; ``-`` is standard input, which can be read once, or a file called so.

    Raises:
        RotqError: as ``read_stored`` and ``find_path``.
    """
    if str(path) == "-" and not path.exists():
        return _read(sys.stdin.buffer, refusal)
    return read_stored(find_path(str(path)) or path, refusal)


def unpacked_name(source: str) -> str:
    """A file's name in lower case, without the ending of what packed it."""
    name = source.lower()
    return next((name.removesuffix(end) for end in _PACKED_ENDINGS if name.endswith(end)), name)


def decompress(source: str, data: bytes) -> bytes:
    """The content of a file that may be packed; by its first bytes, not by its name.

    Raises:
        RotqError: damaged, more than ``LARGEST`` bytes, or packed by something else.
    """
    for kind, beginning in _OTHERS.items():
        if beginning.match(data):
            raise RotqError(
                f"{source} is a {kind} file; only {', '.join(_PACKED)} are read: unpack it"
            )
    for kind, (beginning, opened) in _PACKED.items():
        if beginning.match(data):
            try:
                with opened(io.BytesIO(data)) as file:
                    return _read(file, source)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise RotqError(f"{source}: damaged {kind} file: {error}") from None
    return data


def decode(source: str, data: bytes, *, latin: bool = False) -> Decoded:
    """Text of bytes.

    Args:
        source: Of the bytes, for messages.
        data: Unpacked.
        latin: Read what has no mark and is not UTF-8 as Latin-1.

    Raises:
        RotqError: not in the encoding of its mark, or else not UTF-8 (names the byte and its line);
            or full of NULs.
    """
    mark, encoding = next(found for found in _ENCODINGS if data.startswith(found[0]))
    body = data[len(mark) :]
    try:
        content = body.decode(encoding)
    except UnicodeDecodeError as error:
        if latin and not mark:
            return Decoded(_plain_lines(body.decode(_LATIN)), is_utf8=False)
        line = 1 + _plain_lines(body[: error.start].decode(encoding)).count("\n")
        name = encoding.upper().removesuffix("-LE").removesuffix("-BE")
        raise RotqError(
            f"text {source} is not {name}: byte 0x{body[error.start]:02x} at offset "
            f"{len(mark) + error.start}, line {line}; convert it to UTF-8"
        ) from None
    if 8 * content.count("\0") > len(content):
        raise RotqError(
            f"text {source} is full of NULs: no text, or UTF-16 without a byte order mark"
        )
    return Decoded(_plain_lines(content), is_utf8=True)


def _no_file(source: str) -> RotqError:
    return RotqError(
        f"text {source} is a pipe, a socket or a device; texts are read more than once: write it "
        "to a file"
    )


def _plain_lines(content: str) -> str:
    """Lines end in \\n, as Python's text mode gives them, and none begins with a mark."""
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    return content.replace(f"\n{_MARK}", "\n").removeprefix(_MARK)


def _read(file: IO[bytes], refusal: str) -> bytes:
    """All of a file; what unpacks to very much is refused before it is held."""
    found = io.BytesIO()
    while piece := file.read(_PIECE):
        found.write(piece)
        if found.tell() > LARGEST:
            raise RotqError(f"{refusal}: more than {LARGEST >> 30} GiB of text; give a part of it")
    return found.getvalue()
