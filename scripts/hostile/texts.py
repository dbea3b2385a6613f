"""Hostile FASTA files, JSON lines and texts."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from bench import SENTENCE, Bench, Case
from config_files import DEEP

SOUND = b">p\nMKTAYIAKQRQISFVKSHFSRQMKTAYIAKQRQISFVKSHFSRQ\n"

FASTA: dict[str, bytes] = {
    "empty": b"",
    "spaces": b" \n\n \n",
    "no-header": b"MKTAYIAK\n",
    "headers-only": b">a\n>b\n>c\n",
    "header-empty": b">\nMKT\n",
    "nul": b">a\nMK\0TA\n",
    "latin": b">prot\xe9ine\nMKTAYIAKQRQISFVKSHFSRQ\n",
    "utf-16": SOUND.decode().encode("utf-16"),
    "bom": b"\xef\xbb\xbf" + SOUND,
    "separators": ">a\u2028b\x0b\x0c\x1c\x85c\nMKTAYIAKQR\n".encode(),
    "digits": b">a\nMK123\n",
    "letters-far": ">a\nMKŤÄß\n".encode(),
    "stops": b">a\n***\n>b\nM*K\n",
    "gaps": b">a\n-----\n.....\n",
    "binary": bytes(range(256)) * 50,
    "one-long": b">a\n" + b"M" * 20_000_000,
    "many": b">a\nM\n" * 1_000_000,
    "long-header": b">" + b"x" * 20_000_000 + b"\nMKT\n",
    "returns": b">a\rMKTAYIAK\r>b\rMKT\r",
    "gzip-cut": gzip.compress(SOUND * 100)[:-20],
    "gzip-not": b"\x1f\x8b" + b"\0" * 50,
    "gzip-in-gzip": gzip.compress(gzip.compress(SOUND)),
}

LINES: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"text": "a',
    "list": b"[1, 2]\n",
    "number": b"3\n",
    "no-text": b'{"txt": "a"}\n',
    "text-null": b'{"text": null}\n',
    "text-list": b'{"text": ["a"]}\n',
    "text-empty": b'{"text": ""}\n',
    "latin": b'{"text": "caf\xe9"}\n',
    "bom": b"\xef\xbb\xbf" + json.dumps({"text": SENTENCE * 20}).encode(),
    "surrogate": b'{"text": "' + b"\\ud83d and more " * 100 + b'"}\n',
    "nul": b'{"text": "' + b"\\u0000" * 500 + b'"}\n',
    "deep": b'{"text": ' + DEEP.encode() + b"}\n",
    "digits": b'{"text": ' + b"9" * 9000 + b"}\n",
    "twice": b'{"text": "a", "text": 3}\n',
    "nan": b'{"text": NaN}\n',
    "utf-16": json.dumps({"text": SENTENCE * 20}).encode("utf-16"),
    "separators": json.dumps({"text": SENTENCE * 20}).encode() + b"\xe2\x80\xa8",
    "long-line": b'{"text": "' + b"word " * 400_000 + b'"}\n',
    "many-lines": b'{"text": "word"}\n' * 200_000,
}

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "spaces": b" \n" * 3000,
    "one-letter": b"a" * 30_000,
    "nul": b"\0" * 3000,
    "latin": b"caf\xe9 " * 500,
    "utf-16": (SENTENCE * 20).encode("utf-16"),
    "utf-32": (SENTENCE * 20).encode("utf-32"),
    "bom": b"\xef\xbb\xbf" + SENTENCE.encode() * 20,
    "end-tokens": b"<|end|>" * 500,
    "surrogate-bytes": b"\xed\xa0\xbd" * 500,
    "binary": bytes(range(256)) * 50,
    "no-spaces": b"abcdefghij" * 30_000,
    "controls": b"\x1b[2J\r\b" * 800,
    "gzip-cut": gzip.compress(SENTENCE.encode() * 100)[:-20],
}


def cases() -> Iterator[Case]:
    for name, raw in FASTA.items():
        yield from _proteins(name, raw)
    for name, raw in LINES.items():
        yield from _text(f"lines-{name}", "text.jsonl", raw)
    for name, raw in TEXTS.items():
        yield from _text(f"text-{name}", "text.txt", raw)
    yield Case("fasta-gzip-bomb-pll", lambda bench: _pll(bench, _bomb(bench)))
    yield Case("text-folder-ppl", lambda bench: bench.ppl(bench.llama, bench.work))
    yield Case("text-device-ppl", lambda bench: bench.ppl(bench.llama, Path("/dev/zero")))
    yield Case("text-missing-ppl", lambda bench: bench.ppl(bench.llama, bench.work / "no.txt"))
    yield Case("text-nothing-ppl", lambda bench: bench.ppl(bench.llama, Path("/dev/null")))


def _proteins(name: str, raw: bytes) -> Iterator[Case]:
    yield Case(f"fasta-{name}-pll", lambda bench: _pll(bench, bench.file("p.fasta", raw)))
    yield Case(
        f"fasta-{name}-job",
        lambda bench: _job(bench, bench.esm, bench.file("p.fasta", raw)),
    )


def _text(name: str, file: str, raw: bytes) -> Iterator[Case]:
    yield Case(f"{name}-ppl", lambda bench: bench.ppl(bench.llama, bench.file(file, raw)))
    yield Case(f"{name}-job", lambda bench: _job(bench, bench.llama, bench.file(file, raw)))


def _pll(bench: Bench, file: Path) -> list[object]:
    few = ["--sequences", 1, "--max-length", 40, "--positions", 3]
    return ["eval", "pll", bench.esm, "--fasta", file, *few]


def _job(bench: Bench, model: Path, file: Path) -> list[object]:
    return bench.quantize(model, bench.out(), "--calibration", file)


def _bomb(bench: Bench) -> Path:
    """4 GB of one residue in 4 MB."""
    path = bench.fresh("p.fasta.gz")
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(b">a\n")
        for _ in range(400):
            file.write(b"M" * 10_000_000)
    return path
