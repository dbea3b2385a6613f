"""Recipes with papers' own settings, and the script that runs them."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from tiny_jobs import load_script, make_checkpoint

from rotq.cli.main import main
from rotq.kv.presets import PRESETS, KVSpec
from rotq.recipe import load_recipe

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs/papers").glob("*.yaml"))
RECIPES = [file for file in FILES if file.stem != "turboesm"]
reproduce = load_script("reproduce")
TABLES = yaml.safe_load((ROOT / "scripts/papers.yaml").read_text(encoding="utf-8"))


def test_every_paper_has_a_file() -> None:
    papers = {"gptq", "quarot", "spinquant", "ostquant", "rsq", "turboesm"}
    assert {file.stem for file in FILES} == papers
    assert {*TABLES, "turboesm"} == papers


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_says_its_paper_and_how_it_differs(file: Path) -> None:
    assert load_recipe(file, {}).name == file.stem
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert "arXiv" in " ".join(comments)
    assert [line for line in comments if line.startswith("#   ")], "no difference is named"


@pytest.mark.parametrize("name", ["quarot", "papers/quarot"])
def test_both_of_a_name_are_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["quantize", "--print-config", "-c", name]
    done = CliRunner().invoke(main, arguments, prog_name="rotq")
    assert done.exit_code == 0, done.output
    found = yaml.safe_load(done.stdout)
    assert found["name"] == "quarot"
    assert found["kv_cache"]["bits"] == (4 if "/" in name else 16)


def test_turboesm_is_the_preset_of_the_cache() -> None:
    file = ROOT / "configs/papers/turboesm.yaml"
    assert KVSpec.from_dict(yaml.safe_load(file.read_text())) == PRESETS["turboesm"]


@pytest.mark.parametrize("paper", TABLES)
def test_rows_of_tables_are_recipes(paper: str) -> None:
    for row in TABLES[paper]["rows"].values():
        if "peer" in row:
            assert (ROOT / "scripts/peers" / row["peer"]).is_file()
        else:
            load_recipe(ROOT / f"configs/{row['recipe']}.yaml", row.get("set", {}))


def test_shares_and_claims() -> None:
    assert reproduce.shares_closed(100, 1, [100, 10, 1]) == [0, 0.5, 1]
    rows = [
        reproduce.Row(name=name, printed=printed, found=found)
        for name, printed, found in (("a", 9.0, 50.0), ("b", 5.0, 20.0), ("c", 4.0, 30.0))
    ]
    assert reproduce.order_claims(rows) == [
        ("b is better than a", True),
        ("c is better than b", False),
    ]
    paper = {"title": "T", "table": "t", "original": 3.0}
    lines = reproduce.render(paper, rows, 10.0, "here").splitlines()
    closed = math.log(50 / 20) / math.log(50 / 10)
    assert lines[-4].split() == ["c", "4", "74%", "30.00", f"{math.log(50 / 30) / math.log(5):.0%}"]
    assert f"{closed:.0%}" in lines[-5]
    assert lines[-2:] == ["yes  b is better than a", "NO   c is better than b"]


def test_a_table_is_made_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a fresh process takes seconds; it is tested in tests/checkpoint/test_reload.py
    monkeypatch.setattr("rotq.quantize.publish.check_reload", lambda *_, **__: None)
    model = make_checkpoint(tmp_path / "model")
    small = ["--num-samples", "4", "--calibration-seq-len", "64", "--windows", "2"]
    arguments = ["gptq", "--model", str(model), "--work", str(tmp_path / "work"), *small]
    arguments += ["--seq-len", "64"]
    reproduce.main(arguments)
    first = capsys.readouterr().out
    assert "not the paper's size: windows of calibration: 4, tokens of each: 64" in first
    assert "GPTQ is better than RTN" in first
    assert "GPTQModel" not in first
    monkeypatch.setattr(reproduce, "run_row", lambda *_: None)
    reproduce.main(arguments)
    assert capsys.readouterr().out == first


def test_a_peer_sees_the_windows_of_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(reproduce.subprocess, "run", lambda command, **_: ran.append(command))
    model = make_checkpoint(tmp_path / "model")
    small = ["--num-samples", "3", "--calibration-seq-len", "32"]
    given = ["gptq", "--model", str(model), *small, "--peer", "GPTQModel=env/bin/python"]
    options = reproduce.parse(given)
    asked = TABLES["gptq"]["rows"]["GPTQModel"]
    reproduce.run_peer(asked, options.peers["GPTQModel"], tmp_path / "work/gptqmodel", options)
    [command] = ran
    assert command[0] == "env/bin/python"
    assert Path(command[1]).name == "gptqmodel_gptq.py"
    assert command[-4:] == ["--bits", "3", "--group-size", "-1"]
    ids = torch.load(command[command.index("--calibration-ids") + 1])
    assert ids.shape == (3, 32)
