"""``rotq compare``: one table of several checkpoints."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_models import tiny_model
from tiny_proteins import esm_tokenizer, sequences, write_fasta

import rotq.quantize.publish
from rotq.cli.main import main


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), prog_name="rotq")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``dense``, and ``w3`` and ``w8`` made of it; ``p.fasta``."""
    folder = tmp_path_factory.mktemp("compare")
    dense = folder / "dense"
    tiny_model("llama", dtype=torch.float32).save_pretrained(dense)
    esm_tokenizer(dense).save_pretrained(dense)
    proteins = write_fasta(folder / "p.fasta", sequences(30))
    with pytest.MonkeyPatch.context() as patch:
        # a fresh process takes seconds; it is tested in tests/checkpoint/test_reload.py
        patch.setattr(rotq.quantize.publish, "check_reload", lambda *_, **__: None)
        for bits in (3, 8):
            small = ["--num-samples", "8", "--seq-len", "32", "--set", "weights.group_size=16"]
            wanted = ["--set", f"weights.bits={bits}", "--calibration", proteins]
            done = run("quantize", dense, *small, *wanted, "-o", folder / f"w{bits}")
            assert done.exit_code == 0, done.output
        yield folder


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


SMALL = ["--reference", "dense", "--text", "p.fasta", "--windows", "4", "--seq-len", "32"]


def test_figures_are_those_of_eval_ppl_and_inspect() -> None:
    done = run("compare", "w8", "w3", *SMALL, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [one["name"] for one in report["checkpoints"]] == ["w8", "w3"]
    for one in report["checkpoints"]:
        alone = json.loads(run("eval", "ppl", one["name"], *SMALL, "--json").stdout)
        assert one["evaluation"] == alone
        job = json.loads(run("inspect", one["name"], "--json").stdout)["report"]
        assert one["bits_all_in"] == job["bits_per_weight_all_in"]
        assert one["bits"] == job["bits_per_weight"]
        assert one["bytes"] == job["bytes"]
        ratio = math.log(alone["ppl"] / alone["reference_ppl"])
        assert one["ln_ratio"]["mean"] == pytest.approx(ratio)
    eight, three = report["checkpoints"]
    assert eight["evaluation"]["kl"] < three["evaluation"]["kl"]
    assert eight["against_first"] is None
    assert three["against_first"]["low"] <= three["against_first"]["high"]


@pytest.mark.parametrize("form", [["--json"], []], ids=["json", "table"])
def test_twice_is_the_same(form: list[str]) -> None:
    first, second = (run("compare", "w3", "w8", *SMALL, *form) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output
    assert first.stdout == second.stdout


def test_a_table_has_a_column_for_each() -> None:
    done = run("compare", "w8", "w3", "dense", *SMALL)
    assert done.exit_code == 0, done.output
    lines = {line.split("  ")[0].strip(): line.split() for line in done.stdout.splitlines()}
    assert done.stdout.splitlines()[0].split() == ["w8", "w3", "dense"]
    assert lines["bits of linears"][-1] == "-"
    assert lines["KL"][-1] == "0.00000"
    assert "windows drawn again in pairs" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "Missing argument 'CHECKPOINTS...'"),
        (["w3", "w3", *SMALL], 2, "w3 is given twice"),
        (["w3", "none", *SMALL], 1, "none does not exist"),
        (["w3", "--text", "p.fasta"], 2, "Missing option '--reference'"),
        (["w3", *SMALL, "--windows", "900"], 1, "text is too short"),
        (["w3", *SMALL, "--html", "p.fasta"], 1, "p.fasta is the text p.fasta"),
        (["w3", *SMALL, "--html", "mine.html"], 1, "exists and is no page of rotq's"),
    ],
)
def test_wrong_use(arguments: list[str], code: int, message: str) -> None:
    Path("mine.html").write_text("<title>mine</title>")
    done = run("compare", *arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_pickled_checkpoint_has_a_size_too(folder: Path) -> None:
    pickled = folder / "pickled"
    dense = rotq.load(folder / "dense")
    esm_tokenizer(pickled).save_pretrained(pickled)
    dense.config.save_pretrained(pickled)
    torch.save(dense.state_dict(), pickled / "pytorch_model.bin")
    done = run("compare", "pickled", "dense", *SMALL, "--json")
    assert done.exit_code == 0, done.output
    first, second = json.loads(done.stdout)["checkpoints"]
    assert first["evaluation"] == second["evaluation"]
    assert first["bytes"] > 0.9 * second["bytes"]


def test_a_page_has_the_table_and_its_figures() -> None:
    done = run("compare", "w3", "w8", *SMALL, "--html", "page.html")
    assert done.exit_code == 0, done.output
    assert done.stdout == run("compare", "w3", "w8", *SMALL).stdout
    page = Path("page.html").read_text()
    report = json.loads(run("compare", "w3", "w8", *SMALL, "--json").stdout)
    for one in report["checkpoints"]:
        assert f"<td>{one['evaluation']['kl']:.5f}</td>" in page
    assert page.count("<svg") == 3
    again = run("compare", "w3", "w8", *SMALL, "--html", "page.html")
    assert again.exit_code == 0, again.output
    assert Path("page.html").read_text() == page


def test_a_report_needs_no_model() -> None:
    done = run("report", "w3", "w8", "-o", "own.html", "--json")
    assert done.exit_code == 0, done.output
    page = Path("own.html").read_text()
    assert json.loads(done.stdout)["bytes"] == len(page.encode())
    assert page.count("What was done: ") == 2
    assert "block 1, mlp.down_proj: " in page
    assert "Not measured: give --reference MODEL" in page


def test_a_report_measures_what_it_is_asked_for(folder: Path) -> None:
    kv = ["--kv", "turboquant", "--new-tokens", "4"]
    done = run("report", "w3", "w8", "-o", "whole.html", *SMALL, *kv)
    assert done.exit_code == 0, done.output
    page = Path("whole.html").read_text()
    for title in ("Size against KL", "How sure", "KL over positions", "Packed keys and values"):
        assert f"<h2>{title}</h2>" in page
    measured = ["eval", "kv", "dense", "--kv", "turboquant", *SMALL[2:], "--json"]
    [row] = [json.loads(run(*measured).stdout)]
    assert f"dense, layer 1: {row['attention_error'][1]:.2%}" in page
    assert page.count('<span class="prompt">') == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["w3"], 2, "Missing option '-o'"),
        (["w3", "-o", "x.html", "--reference", "dense"], 2, "--reference and --text go together"),
        (["w3", "-o", "x.html", "--kv", "k3v3"], 2, "--kv needs --reference and --text"),
        (["w3", "w3", "-o", "x.html"], 2, "w3 is given twice"),
        (["none", "-o", "x.html"], 1, "none does not exist"),
        (["w3", "-o", "w3/x.html"], 1, "w3/x.html lies inside the checkpoint w3"),
        (["w3", "-o", "no/x.html"], 1, "is not a folder"),
    ],
)
def test_wrong_use_of_report(arguments: list[str], code: int, message: str) -> None:
    done = run("report", *arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
