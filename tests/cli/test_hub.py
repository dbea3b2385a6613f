"""Commands on models of the hub: quantized from it, resumed, and pushed to it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hub_server import Hub, hub_server, use_hub
from tiny_jobs import files_of, make_checkpoint, quantize

from rotq.cli.main import main

REPO = "tiny-org/tiny"
RTN = ["-c", "rtn", "--set", "weights.group_size=-1", "--device", "cpu"]


PUSHES = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
"""huggingface_hub uploads in a way that the library below it warns of."""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="rotq")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub_server() as found:
        use_hub(monkeypatch, found.url, tmp_path / "cache", offline=False)
        yield found


def test_quantize_by_name(
    model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a connection that breaks in the middle of the weights."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    commit = hub.add(REPO, model)
    hub.breaks["model.safetensors"] = [101_000, 3000]  # the first answer is the header alone
    out = tmp_path / "out"
    done = quantize(REPO, *RTN, "-o", out)
    assert done.exit_code == 0, done.stderr
    assert f"{REPO}: commit {commit}\n" in done.stderr
    assert [line for line in hub.ranges if line.endswith("bytes=3000-")]
    provenance = json.loads((out / "rotq_provenance.json").read_text())
    assert (provenance["model"], provenance["commit"]) == (REPO, commit)
    report = json.loads((out / "report.json").read_text())
    assert (report["model"], report["commit"]) == (REPO, commit)
    card = (out / "README.md").read_text()
    assert f"base_model: {REPO}\n" in card
    assert f"`{REPO}@{commit}`" in card
    assert commit in run("inspect", out).stdout

    assert quantize(model, *RTN, "-o", tmp_path / "local").exit_code == 0
    ours, theirs = files_of(out), files_of(tmp_path / "local")
    differing = {name for name in ours | theirs if ours.get(name) != theirs.get(name)}
    assert differing == {"README.md", "rotq_provenance.json"}


def test_another_commit_is_another_job(model: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, model)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "rotq", "quantize", REPO, *RTN, "-o", str(out)]
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **told, "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    partial = out.with_name("out.partial")
    while process.poll() is None and not list(partial.glob("block*")):
        time.sleep(0.01)
    process.terminate()
    process.communicate()
    assert process.returncode == 75
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    (changed / "NOTES.md").write_text("another commit, with the same weights")
    commit = hub.add(REPO, changed)
    again = [*RTN, "-o", out, "--resume", "required"]
    refused = quantize(REPO, *again)
    assert refused.exit_code == 1
    assert "holds a job with another commit; use --resume never" in refused.stderr
    first = next(iter(hub.commits[REPO]))
    resumed = quantize(f"{REPO}@{first}", *again)
    assert resumed.exit_code == 0, resumed.stderr
    assert commit not in (out / "rotq_provenance.json").read_text()


def test_a_dry_run_fetches_no_weights(model: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, model)
    done = run("quantize", REPO, *RTN, "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert hub.ranges == ["model.safetensors bytes=0-100000"]
    assert f"{REPO}: fetched config.json, " in done.stderr
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


def test_refused_before_the_weights(model: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add(REPO, model)
    for arguments in (
        ["--calibration", str(tmp_path / "none.txt"), "-c", "gptq"],
        ["--eval-text", str(tmp_path / "none.txt")],
    ):
        done = quantize(REPO, *RTN, "-o", tmp_path / "out", *arguments)
        assert done.exit_code == 1
        assert "none.txt: no such file" in done.stderr
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


def test_without_network(tmp_path: Path) -> None:
    """A process of its own: huggingface_hub reads the environment once."""
    for told, words in (
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
        (
            {
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": "http://hub.invalid",
                "HTTP_PROXY": "http://127.0.0.1:9",
                "NO_PROXY": "",
            },
            "cannot be reached",
        ),
        (
            {
                "HF_HUB_OFFLINE": "0",
                "HF_ENDPOINT": "https://hub.invalid",
                "HTTPS_PROXY": "http://127.0.0.1:9",
                "NO_PROXY": "",
            },
            "cannot be reached",
        ),
    ):
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "rotq", "quantize", "org/name", "-o", str(tmp_path / "out")],
            env={**os.environ, **told, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("rotq: error: org/name is no folder here and not in the hub")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert time.monotonic() - started < 60
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def out(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tiny-w4"
    assert quantize(model, *RTN, "-o", folder).exit_code == 0
    return folder


@PUSHES
def test_push(out: Path, hub: Hub) -> None:
    done = run("push", out, "me/tiny-w4", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["private"]
    assert told["url"] == f"{hub.url}/me/tiny-w4"
    assert hub.created["me/tiny-w4"]["visibility"] == "private"
    assert hub.messages == ["Upload tiny-w4, quantized with rotq"]
    there = hub.commits["me/tiny-w4"][told["commit"]]
    here = {file.name: file.read_bytes() for file in out.iterdir()}
    assert there.keys() == here.keys()
    assert {name for name in here if there[name] != here[name]} == {
        "README.md",
        "rotq_provenance.json",
    }
    assert b'from_pretrained("me/tiny-w4")' in there["README.md"]
    verified = run("inspect", "me/tiny-w4", "--verify")
    assert verified.exit_code == 0, verified.stderr
    text = str(Path(__file__).parents[2] / "README.md")
    scored = [
        run("eval", "ppl", name, "--text", text, "--windows", "1", "--seq-len", "64", "--json")
        for name in ("me/tiny-w4", out)
    ]
    assert scored[0].exit_code == 0, scored[0].stderr
    assert scored[0].stdout == scored[1].stdout


@PUSHES
def test_push_in_public_and_again(out: Path, hub: Hub) -> None:
    assert run("push", out, "me/tiny-w4", "--public", "--message", "hello").exit_code == 0
    assert hub.created["me/tiny-w4"]["visibility"] == "public"
    assert hub.messages == ["hello"]
    refused = run("push", out, "me/tiny-w4")
    assert refused.exit_code == 1
    assert "me/tiny-w4 exists and is public; --public" in refused.stderr
    list(hub.commits["me/tiny-w4"].values())[-1]["model-9.safetensors"] = b"of an earlier push"
    again = run("push", out, "me/tiny-w4", "--public")
    assert again.exit_code == 0, again.stderr
    last = list(hub.commits["me/tiny-w4"].values())[-1]
    assert last.keys() == {file.name for file in out.iterdir()}


@PUSHES
def test_a_private_repository_stays_private_and_is_called_so(out: Path, hub: Hub) -> None:
    assert run("push", out, "me/tiny-w4").exit_code == 0
    again = run("push", out, "me/tiny-w4", "--public", "--json")
    assert json.loads(again.stdout)["private"] is True


@pytest.mark.parametrize("kind", ["model", "changed", "more", "missing", "empty", "none"])
def test_only_what_rotq_published_is_pushed(
    kind: str, out: Path, model: Path, hub: Hub, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    if kind == "empty":
        folder.mkdir()
    elif kind != "none":
        shutil.copytree(model if kind == "model" else out, folder)
    if kind == "changed":
        (folder / "config.json").write_text("{}")
    elif kind == "more":
        (folder / "notes.txt").write_text("mine")
    elif kind == "missing":
        (folder / "tokenizer.json").unlink()
    done = run("push", folder, "me/tiny")
    words = {
        "model": "is no checkpoint of rotq's; rotq pushes only what it has written",
        "changed": "config.json, which was changed after rotq wrote it; rotq pushes only",
        "more": "notes.txt, which rotq did not write; rotq pushes only",
        "missing": "lacks tokenizer.json",
        "empty": "is empty; rotq pushes only",
        "none": "does not exist",
    }[kind]
    assert done.exit_code == 1
    assert words in done.stderr
    assert not hub.requests


def test_a_repository_of_others_is_left_alone(out: Path, model: Path, hub: Hub) -> None:
    hub.add("me/other", model)
    hub.created["me/other"] = {"visibility": "private"}
    done = run("push", out, "me/other")
    assert done.exit_code == 1
    assert "and is no checkpoint of rotq's; choose another" in done.stderr
    hub.refusals["/api/repos/create"] = 401
    done = run("push", out, "me/new")
    assert done.exit_code == 1
    assert "log in with hf auth login, or set HF_TOKEN" in done.stderr
    assert run("push", out, "me/new@main").exit_code == 2
