"""`rotq quantize`: what it leaves alone, what it refuses before its work, what a job stands on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from tiny_jobs import files_of, make_checkpoint, quantize

from rotq.job.folder import JobFolder

RTN = ["-c", "rtn", "--num-samples", "1", "--seq-len", "32"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy that may come to harm."""
    return Path(shutil.copytree(original, tmp_path / "models" / "tiny"))


@pytest.fixture(scope="module")
def clean(original: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a job makes that nothing happens to."""
    output = tmp_path_factory.mktemp("clean") / "out"
    done(quantize(original, *RTN, "-o", output))
    return files_of(output)


def done(result: Result) -> None:
    assert result.exit_code == 0, result.stderr


def refused(result: Result, exit_code: int, *words: str) -> None:
    """In one line, before the first block."""
    assert result.exit_code == exit_code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("rotq: error: ")]
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]
    assert "unexpected" not in lines[0]
    assert "block 1/" not in result.stderr


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("options", [[], ["--resume", "never"], ["--dry-run"]])
def test_inputs_are_never_replaced(model: Path, tmp_path: Path, options: list[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("calibration.txt", "evaluation.txt"):
        (texts / name).write_text("name: mine\n" * 500)
    (texts / "mine.yaml").write_text("name: mine\n")
    before = contents(tmp_path)
    always = [*RTN, "--overwrite", *options]
    for output, words, more in (
        (model, "is the model", []),
        (model.parent, "holds the model", []),
        (model / "w4", "lies inside the model", []),
        (texts, "holds the calibration text", ["--calibration", texts / "calibration.txt"]),
        (texts, "holds the evaluation text", ["--eval-text", texts / "evaluation.txt"]),
        (texts, "holds the recipe", ["-c", texts / "mine.yaml"]),
        (texts, "holds calibration.txt, evaluation.txt, mine.yaml and is no checkpoint", []),
    ):
        refused(quantize(model, *always, "-o", output, *more), 1, f"{output} {words}")
    assert contents(tmp_path) == before


def test_a_link_is_published_where_it_points(
    model: Path, tmp_path: Path, clean: dict[str, bytes]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk / "new")
    (tmp_path / "new.old").mkdir()
    done(quantize(model, *RTN, "-o", tmp_path / "out"))
    assert (tmp_path / "out").is_symlink()
    assert files_of(disk / "new") == clean
    assert [path.name for path in disk.iterdir()] == ["new"]


REFUSALS: list[tuple[list[Any], int, str]] = [
    (["MISSING"], 1, "does not exist"),
    (["MODEL", "--device", "cuda"], 1, "--device cuda: this machine has none that torch can use"),
    (["MODEL", "--calibration", "none.txt"], 1, "none.txt: no such file"),
    (["MODEL", "--calibration", "SHORT"], 1, "too short"),
    (["MODEL", "--eval-text", "none.txt"], 1, "none.txt: no such file"),
    (["MODEL", "--eval-text", "SHORT"], 1, "text is too short"),
    (["MODEL", "--set", "weights.group_fallback=error"], 2, "group size 128"),
    (["MODEL", "--set", "output.max_shard_gb=.inf"], 2, "output.max_shard_gb"),
    (["MODEL", "--set", "output.max_shard_gb=1.0e-12"], 2, "output.max_shard_gb"),
]


@pytest.mark.parametrize(("arguments", "exit_code", "words"), REFUSALS)
def test_a_refused_start_leaves_nothing_and_a_dry_run_refuses_the_same(
    original: Path, tmp_path: Path, arguments: list[Any], exit_code: int, words: str
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has one")
    (tmp_path / "short.txt").write_text("too short")
    named = {
        "MODEL": original,
        "MISSING": tmp_path / "none",
        "SHORT": tmp_path / "short.txt",
    }
    given = [named.get(word, word) for word in arguments]
    output = tmp_path / "a" / "b" / "out"
    for more in (["-o", output], ["--dry-run"]):
        refused(quantize(given[0], *RTN, *given[1:], *more), exit_code, words)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_the_model_is_scored_before_the_first_block(original: Path, tmp_path: Path) -> None:
    options = ["--eval-text", "pydoc-test", "--eval-windows", "1", "--json"]
    result = quantize(original, *RTN, "-o", tmp_path / "out", *options)
    done(result)
    lines = result.stderr.splitlines()
    (said,) = [line for line in lines if line.startswith("before: perplexity")]
    first = next(line for line in lines if line.startswith("block 1/"))
    assert lines.index(said) < lines.index(first)
    scored = json.loads(result.stdout)["evaluation"]
    assert said == f"before: perplexity {scored['reference_ppl']:.4g} on pydoc-test"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["evaluation"] == scored


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def stopped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output of a job whose blocks are done."""
    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("rotq.quantize.pipeline.publish", interrupt)
        result = quantize(model, *RTN, "-o", output)
    assert result.exit_code == 75, result.stderr
    assert not output.exists()
    return output


def reword(file: Path) -> None:
    file.write_text(file.read_text().replace("{", "{ ", 1))


def add(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("# new\n")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", reword),
        ("tokenizer_config.json", reword),
        ("generation_config.json", reword),
        ("generation_config.json", Path.unlink),
        ("vocab.txt", add),
        ("chat_template.jinja", add),
        ("additional_chat_templates/tool_use.jinja", add),
        ("modeling_mine.py", add),
    ],
)
def test_a_job_stands_on_every_file_that_decides_its_result(
    model: Path, stopped: Path, name: str, change: Callable[[Path], Any]
) -> None:
    change(model / name)
    refused(quantize(model, *RTN, "-o", stopped), 1, f"another {name}; use --resume never")


def test_a_card_beside_the_weights_decides_nothing(
    model: Path, stopped: Path, clean: dict[str, bytes]
) -> None:
    (model / "README.md").write_text("# my model")
    done(quantize(model, *RTN, "-o", stopped))
    assert files_of(stopped) == clean


def test_a_file_that_is_changed_while_the_job_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rotq.quantize import pipeline

    publish = pipeline.publish

    def late(*arguments: Any, **options: Any) -> Any:
        reword(model / "tokenizer.json")
        return publish(*arguments, **options)

    monkeypatch.setattr("rotq.quantize.pipeline.publish", late)
    result = quantize(model, *RTN, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert f"{model / 'tokenizer.json'} was changed while the job ran" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["outer", "block-00001"])
def test_a_flipped_bit_of_a_part_is_not_published(
    model: Path, stopped: Path, name: str, clean: dict[str, bytes]
) -> None:
    part = stopped.with_name("out.partial") / f"{name}.safetensors"
    data = bytearray(part.read_bytes())
    data[-100] ^= 0x40
    part.write_bytes(data)
    result = quantize(model, *RTN, "-o", stopped)
    assert result.exit_code == 3
    assert f"{part} was changed on the disk after it was written" in result.stderr
    assert not stopped.exists()
    done(quantize(model, *RTN, "-o", stopped))
    assert files_of(stopped) == clean


def test_a_job_that_was_killed_behind_its_publication_ends(
    model: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch, clean: dict[str, bytes]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(JobFolder, "leave", interrupt)
        assert quantize(model, *RTN, "-o", stopped).exit_code == 75
    assert stopped.exists()
    assert stopped.with_name("out.partial").exists()
    again = quantize(model, *RTN, "-o", stopped, "--json")
    done(again)
    assert json.loads(again.stdout) == json.loads((stopped / "report.json").read_text())
    assert files_of(stopped) == clean
    assert not stopped.with_name("out.partial").exists()
    refused(quantize(model, *RTN, "-o", stopped), 1, "exists")
