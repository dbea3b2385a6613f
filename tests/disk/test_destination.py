"""Which paths a command may write: resolved, apart from its inputs, rotq's own or new."""

import os
from pathlib import Path

import pytest

from rotq.disk.destination import file_to_write, named_file, resolve_output
from rotq.errors import RotqError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def refused(output: Path, model: Path, *words: str) -> None:
    before = sorted(model.parent.parent.rglob("*"))
    with pytest.raises(RotqError) as caught:
        resolve_output(output, {"the model": model})
    for word in words:
        assert word in str(caught.value)
    assert sorted(model.parent.parent.rglob("*")) == before


def test_a_new_folder_beside_the_model(tmp_path: Path, model: Path) -> None:
    for output in (tmp_path / "out", tmp_path / "a" / "b", model.with_name("m-w3")):
        assert resolve_output(output, {"the model": model}) == output


def test_it_is_holds_or_lies_inside_the_model(tmp_path: Path, model: Path) -> None:
    refused(model, model, f"{model} is the model {model}")
    refused(model.parent, model, "holds the model")
    refused(tmp_path, model, "holds the model")
    refused(model / "w3", model, "lies inside the model")
    refused(model / "a" / "b", model, "lies inside the model")
    refused(tmp_path / "x" / ".." / "models" / "m", model, "is the model")


def test_through_links(tmp_path: Path, model: Path) -> None:
    (tmp_path / "to_model").symlink_to(model)
    (tmp_path / "to_parent").symlink_to(model.parent)
    refused(tmp_path / "to_model", model, "is the model")
    refused(tmp_path / "to_parent", model, "holds the model")
    refused(tmp_path / "to_model" / "w3", model, "lies inside")
    refused(model, tmp_path / "to_model", "is the model")
    refused(model.parent, tmp_path / "to_parent" / "m", "holds the model")


def test_files_that_the_model_folder_links_to(tmp_path: Path, model: Path) -> None:
    """As in the hub's cache, where a snapshot links to blobs."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text("weights")
    (model / "model.safetensors").symlink_to(blobs / "abc")
    refused(blobs, model, "holds the model")
    refused(blobs / "abc", model, "is the model")


def test_another_name_of_the_same_file(tmp_path: Path, model: Path) -> None:
    os.link(model / "config.json", tmp_path / "hard")
    refused(tmp_path / "hard", model / "config.json", "is the model")


def test_an_input_that_is_not_there_is_in_nobodys_way(tmp_path: Path) -> None:
    assert resolve_output(tmp_path / "out", {"the model": tmp_path / "none"})


def test_links_as_outputs_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    (tmp_path / "dangling").symlink_to(tmp_path / "later" / "x")
    assert resolve_output(tmp_path / "out", {}) == tmp_path / "disk"
    assert resolve_output(tmp_path / "dangling", {}) == tmp_path / "later" / "x"


def test_places_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for output, word in (
        (tmp_path / "file" / "out", "is not a folder"),
        (tmp_path / "a", "leads to itself"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/"), "root of the file system"),
    ):
        with pytest.raises(RotqError, match=word):
            resolve_output(output, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(RotqError, match="no permission"):
        resolve_output(tmp_path / "closed" / "out", {})


def ours(path: Path) -> str | None:
    return None if path.read_text() == "ours" else "is not ours"


def test_one_file_is_replaced_only_if_it_is_of_the_kind(tmp_path: Path) -> None:
    for name in ("ours", "mine"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert file_to_write(tmp_path / "ours", {}, ours) == tmp_path / "ours"
    assert file_to_write(tmp_path / "new", {}, ours) == tmp_path / "new"
    for name in ("mine", "link"):
        with pytest.raises(RotqError, match="is not ours; rotq replaces only what it has written"):
            file_to_write(tmp_path / name, {}, ours)
    with pytest.raises(RotqError, match="it is a folder"):
        file_to_write(tmp_path, {}, ours)
    with pytest.raises(RotqError, match="none is not a folder"):
        file_to_write(tmp_path / "none" / "x", {}, ours)
    assert file_to_write(tmp_path / "none" / "x", {}, ours, parents=True)


def test_a_name_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert named_file("text.txt") == Path("text.txt")
    assert named_file("pydoc") is None
    assert named_file("x" * 5000) is None
