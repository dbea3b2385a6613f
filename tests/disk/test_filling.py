"""Scripts fill a folder that is new, empty, or their own."""

from pathlib import Path
from typing import Any

import pytest
from tiny_jobs import load_script

from rotq.disk.filling import MARK, folder_to_fill
from rotq.errors import RotqError


def test_new_empty_and_their_own(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "later")
    for name in ("new/x", "empty", "link"):
        folder = folder_to_fill(tmp_path / name, "a.py")
        assert [path.name for path in folder.iterdir()] == [MARK]
        (folder / "model.safetensors").write_text("weights")
        assert folder_to_fill(tmp_path / name, "a.py") == folder
        with pytest.raises(RotqError, match=r"was not made by b\.py"):
            folder_to_fill(tmp_path / name, "b.py")
    assert (tmp_path / "link").is_symlink()


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RotqError, match=r"holds config\.json and was not made by a\.py"):
        folder_to_fill(tmp_path, "a.py")
    with pytest.raises(RotqError, match="is a file"):
        folder_to_fill(tmp_path / "config.json", "a.py")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train_tiny", ["--steps", "0"]),
        ("train_tiny_esm", ["--fasta", "none.fasta"]),
        ("fetch_antiberty", []),
    ],
)
def test_scripts_refuse_before_they_work(
    tmp_path: Path, name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_text("weights")
    script: Any = load_script(name)
    monkeypatch.setattr("sys.argv", [name, str(tmp_path), *arguments])
    monkeypatch.setattr(script, "find", lambda ending: tmp_path / ending, raising=False)
    with pytest.raises(SystemExit, match=r"holds model\.safetensors and was not made by"):
        script.main()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_link_to_a_gguf_replaces_no_file(tmp_path: Path) -> None:
    script = load_script("fetch_smollm2")
    gguf = tmp_path / "package" / "m.gguf"
    gguf.parent.mkdir()
    gguf.write_text("weights")
    for _ in range(2):
        assert script.link(gguf, tmp_path / "model") == tmp_path / "model"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "m.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="is no link"):
        script.link(gguf, tmp_path / "own")
    assert (tmp_path / "own" / "m.gguf").read_text() == "mine"
