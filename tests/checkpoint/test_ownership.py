"""A folder is rotq's to replace if every file in it is what the provenance says."""

import json
from pathlib import Path

import pytest

from rotq.checkpoint.ownership import foreign
from rotq.disk.files import sha256_of


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "templates").mkdir(parents=True)
    names = ("model.safetensors", "README.md", "templates/chat.jinja")
    for name in names:
        (folder / name).write_text(name)
    files = {name: sha256_of(folder / name) for name in names}
    (folder / "rotq_provenance.json").write_text(json.dumps({"files": files}))
    (folder / "report.json").write_text("{}")
    return folder


def test_a_checkpoint_and_an_empty_folder(checkpoint: Path, tmp_path: Path) -> None:
    assert foreign(checkpoint) is None
    (checkpoint / "report.json").write_text('{"evaluation": 1}')
    assert foreign(checkpoint) is None
    (tmp_path / "empty").mkdir()
    assert foreign(tmp_path / "empty") is None


def test_a_file_of_the_users_own(checkpoint: Path) -> None:
    (checkpoint / "notes.txt").write_text("mine")
    assert foreign(checkpoint) == "holds notes.txt, which rotq did not write"


def test_in_a_folder_below(checkpoint: Path) -> None:
    (checkpoint / "templates" / "mine.jinja").write_text("mine")
    assert foreign(checkpoint) == "holds templates/mine.jinja, which rotq did not write"


def test_links_and_empty_folders(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (checkpoint / "data").symlink_to(tmp_path / "data")
    assert foreign(checkpoint) == "holds data, which rotq did not write"
    (checkpoint / "data").unlink()
    (checkpoint / "mine").mkdir()
    assert foreign(checkpoint) == "holds mine, which rotq did not write"


def test_a_file_that_became_a_link(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "README.md").rename(tmp_path / "card")
    (checkpoint / "README.md").symlink_to(tmp_path / "card")
    assert foreign(checkpoint) == "holds README.md, which rotq did not write"


def test_a_file_that_the_user_has_edited(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("my own words")
    assert foreign(checkpoint) == "holds README.md, which was changed after rotq wrote it"


def test_folders_without_the_mark(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "rotq_provenance.json").unlink()
    words = "holds README.md, model.safetensors, report.json, ... and is no checkpoint of rotq's"
    assert foreign(checkpoint) == words
    for content in ("", "[]", '{"files": {}}', '{"files": ["model.safetensors"]}'):
        (checkpoint / "rotq_provenance.json").write_text(content)
        found = foreign(checkpoint)
        assert found is not None
        assert "no checkpoint of rotq's" in found


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    assert foreign(tmp_path / "x") == "is a file"
