"""Files that are whole or absent, and what deleting leaves alone."""

import os
from pathlib import Path

import pytest

from rotq.disk.files import remove, rename, sha256_of, whole_file
from rotq.errors import RotqError


def write(path: Path, content: bytes = b"new") -> None:
    with whole_file(path) as file:
        file.write(content)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was synced, in order; "r" of a rename between them."""
    found: list[str] = []
    fsync, replace = os.fsync, os.replace

    def see(handle: int) -> None:
        found.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def see_rename(path: Path, to: Path) -> None:
        found.append("r")
        replace(path, to)

    monkeypatch.setattr("os.fsync", see)
    monkeypatch.setattr("os.replace", see_rename)
    return found


def test_a_file_is_synced_before_its_name_and_the_folder_after_it(
    tmp_path: Path, synced: list[str]
) -> None:
    write(tmp_path / "x")
    assert synced[0].startswith(".rotq-")
    assert synced[1:] == ["r", tmp_path.name]


def test_a_renamed_folder_is_synced_on_both_sides(tmp_path: Path, synced: list[str]) -> None:
    for name in ("a", "b", "a/x"):
        (tmp_path / name).mkdir()
    rename(tmp_path / "a" / "x", tmp_path / "b" / "y")
    assert synced == ["a", "b"]
    with pytest.raises(RotqError, match="cannot rename"):
        rename(tmp_path / "none", tmp_path / "b" / "y")


def test_neighbours_keep_their_names(tmp_path: Path) -> None:
    """Names that a user may have: no file is written under one of them."""
    for name in ("x.partial", "x.tmp", "x.old", ".x"):
        (tmp_path / name).write_text("mine")
    write(tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".x",
        "x",
        "x.old",
        "x.partial",
        "x.tmp",
    ]
    assert all(path.read_text() == "mine" for path in tmp_path.iterdir() if path.name != "x")


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "x").symlink_to(tmp_path / "mine")
    write(tmp_path / "x")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "x").read_text() == "new"
    assert not (tmp_path / "x").is_symlink()


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "x", b"old")

    def stop() -> None:
        with whole_file(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_removing_follows_no_link(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine").write_text("mine")
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "link").symlink_to(kept)
    (tmp_path / "tree" / "file").symlink_to(kept / "mine")
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("tree", "link", "dangling", "none"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "mine").read_text() == "mine"


def test_checksums(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x").startswith("ba7816bf8f01cfea")
    with pytest.raises(RotqError, match="cannot read"):
        sha256_of(tmp_path / "none")
