"""How `make regress` judges; the jobs themselves run there."""

import copy
import json
from typing import Any

import pytest
from tiny_jobs import ROOT, load_script

EXPECTED = {
    "python": "3.11.7",
    "texts": {"pydoc": "a"},
    "figures": {
        "tiny/w3": {"ppl": 30.0, "kl": 0.01},
        "smollm2/w3": {"ppl": 25.0, "kl": 0.1},
    },
}


@pytest.fixture(scope="module")
def regress() -> Any:
    load_script("fetch_smollm2")
    load_script("train_tiny")
    return load_script("regress")


def problems(regress: Any, **changes: Any) -> list[str]:
    found = {**copy.deepcopy(EXPECTED["figures"]), **changes}
    kept = {name: figures for name, figures in found.items() if figures}
    result: list[str] = regress.compare(kept, EXPECTED, {"pydoc": "a"})
    return result


def test_equal_figures_pass(regress: Any) -> None:
    assert problems(regress) == []


@pytest.mark.parametrize(
    ("ppl", "kl", "words"),
    [
        (30.5, 0.0109, []),
        (31.6, 0.01, ["ppl"]),
        (28.4, 0.01, ["ppl"]),
        (30.0, 0.0112, ["kl"]),
        (30.0, 0.0088, ["kl"]),
        (float("nan"), float("nan"), ["ppl", "kl"]),
    ],
)
def test_tolerance(regress: Any, ppl: float, kl: float, words: list[str]) -> None:
    lines = problems(regress, **{"tiny/w3": {"ppl": ppl, "kl": kl}})
    assert [line.split()[:2] for line in lines] == [["tiny/w3:", word] for word in words]


def test_job_without_record_fails(regress: Any) -> None:
    (line,) = problems(regress, **{"tiny/new": {"ppl": 1.0, "kl": 1.0}})
    assert line == "tiny/new: no figures on record; run --update"


def test_record_without_job_fails_unless_the_model_is_not_installed(regress: Any) -> None:
    (line,) = problems(regress, **{"tiny/w3": None})
    assert "tiny/w3: on record, but there is no such job" in line
    assert problems(regress, **{"smollm2/w3": None}) == []


def test_figures_of_another_text_are_not_compared(regress: Any) -> None:
    (line,) = regress.compare({}, EXPECTED, {"pydoc": "b"})
    assert "Python 3.11.7" in line


def test_every_preset_is_on_record() -> None:
    record = json.loads((ROOT / "tests" / "regress" / "expected.json").read_text())
    presets = {file.stem for file in (ROOT / "configs").glob("*.yaml")}
    expected = {f"tiny/{name}" for name in presets} | {"smollm2/w3", "smollm2/w4"}
    assert set(record["figures"]) == expected
