"""What numba compiled is kept: once a machine, and one kind never for another."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from rotq_kernels import compiled

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, numpy as np
from rotq_kernels.rounding import loops
bits = int(sys.argv[1])
bytes_NY = (np.arange(8 * bits) * 37 % 251).astype(np.uint8).reshape(2, 4 * bits)
level_NK = np.empty((2, 32), np.float32)
loops.unpacking(bits)(bytes_NY, np.zeros((2, 1), np.int8), level_NK, 32)
print(int(level_NK.sum()))
stats = loops.unpacking(bits).stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


DECODE = """
import hashlib, numpy as np
from rotq_kernels.kv.cpu import native
draw, f = np.random.default_rng(0), np.float32
H, M, D, S, P = 2, 3, 64, 16, 3
words = draw.integers(0, 2**32, (P, H, S, 6), dtype=np.uint32)
table = draw.integers(-(2**31), 2**31 - 1, (1, 65536)).astype(np.int32)
norms, base = draw.integers(0, 255, (P, H, S)).astype(np.uint8), np.full(H, -3, f)
pages, span = np.arange(P, dtype=np.int32)[None], np.array([[0, 40]])
inverse, mean = draw.standard_normal((H, D, D)).astype(f), draw.standard_normal((H, D)).astype(f)
x, out = draw.standard_normal((1, H, M, D)).astype(f), np.full((1, H, M, 64), -np.inf, f)
native.compiled_scores(3, M, 16, S)(
    (0, H), x, words, norms, base, table, pages, span, np.zeros(1, np.int32), inverse, mean,
    np.zeros(0), f(1), np.zeros((0, S), f), 0, out,
)
weights, values = np.nan_to_num(out, neginf=0), np.zeros((1, H, M, D), f)
native.compiled_values(3, M, 16, S)(
    (0, H), weights, words, norms, base, table, pages, span, inverse, mean, 0, values
)
print(hashlib.sha256(out.tobytes() + values.tobytes()).hexdigest())
print(sum(native.compiled_scores(3, M, 16, S).stats.cache_hits.values()))
"""


def run(bits: int, folder: Path) -> tuple[int, int, int]:
    """A sum of levels, and how often the disk had the code and did not, in a process of its own."""
    total, hits, misses = map(int, said(folder, SCRIPT, str(bits)))
    return total, hits, misses


def said(folder: Path, *script: str) -> list[str]:
    """Words that a process of its own prints."""
    result = subprocess.run(
        [sys.executable, "-c", *script],
        env=os.environ | {"NUMBA_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split()


def test_a_later_process_compiles_nothing(tmp_path: Path) -> None:
    total, hits, misses = run(3, tmp_path)
    assert (hits, misses) == (0, 1)
    assert run(3, tmp_path) == (total, 1, 0)
    # another constant of the closure is another kind, in a file of its own
    assert run(4, tmp_path)[1:] == (0, 1)
    assert run(3, tmp_path) == (total, 1, 0)
    assert len(list(tmp_path.rglob("*.nbc"))) == 2
    assert not list(tmp_path.rglob("*.nbi"))


def test_sums_are_those_of_the_process_that_compiled(tmp_path: Path) -> None:
    """Parts that are not inlined are other machine code there: sums are regrouped otherwise."""
    compiled_there, no_hits = said(tmp_path, DECODE)
    assert said(tmp_path, DECODE) == [compiled_there, "1"]
    assert no_hits == "0"


def adder(number: int) -> object:
    @compiled.kept()
    def add(x):  # type: ignore[no-untyped-def]
        return x + number

    return add


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import numba

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def entries(number: int) -> compiled._Entries:
    found = adder(number)._cache._cache_file  # type: ignore[attr-defined]
    assert isinstance(found, compiled._Entries)
    return found


def test_entries_are_those_of_the_source_they_were_made_of(folder: Path) -> None:
    ours, theirs = entries(1), entries(2)
    ours.save("kind a", b"a")
    theirs.save("kind b", b"b")
    assert (ours.load("kind a"), ours.load("kind b"), ours.load("kind c")) == (b"a", b"b", None)
    theirs._source_stamp = "of another source"
    assert theirs.load("kind a") is None
    theirs.save("kind a", b"new")
    assert (theirs.load("kind a"), ours.load("kind a")) == (b"new", None)
    assert len(list(folder.rglob("*.nbc"))) == 2


@pytest.mark.parametrize("left", [b"", b"not a pickle", None])
def test_what_cannot_be_read_is_compiled_again(folder: Path, left: bytes | None) -> None:
    assert adder(1)(2) == 3  # type: ignore[operator]
    (entry,) = folder.rglob("*.nbc")
    entry.write_bytes(entry.read_bytes()[:1000] if left is None else left)
    again = adder(1)
    assert again(2) == 3  # type: ignore[operator]
    assert sum(again.stats.cache_misses.values()) == 1  # type: ignore[attr-defined]
    assert sum(_hits_of_a_new_one()) == 1


def _hits_of_a_new_one() -> list[int]:
    add = adder(1)
    add(2)  # type: ignore[operator]
    return list(add.stats.cache_hits.values())  # type: ignore[attr-defined]


def test_without_a_place_it_is_compiled_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled._Entries, "_save_data", refuse)
    assert adder(5)(np.int64(2)) == 7  # type: ignore[operator]
    assert not list(folder.rglob("*.nbc"))
    from numba.core import caching

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert adder(6)(np.int64(2)) == 8  # type: ignore[operator]
