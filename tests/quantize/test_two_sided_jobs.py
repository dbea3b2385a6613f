"""Jobs whose rows feel each other: packed, reloaded, better by what they lower, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_jobs import make_checkpoint, quantize

from rotq.checkpoint.files import read_json
from rotq.recipe import load_recipe

pytest.importorskip("numba")
pytestmark = pytest.mark.slow

SMALL = ["--calibration", "pydoc", "--num-samples", "4", "--seq-len", "32", "--json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("two_sided") / "model", num_layers=1)


def run(model: Path, out: Path, preset: str, **changes: Any) -> Any:
    sets = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    options = [word for each in sets for word in ("--set", each)]
    return quantize(model, "-c", preset, "-o", out, *SMALL, *options)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("w3", {}),
        ("w3", {"importance__strategy": "gradient", "weights__average_bits": 3.5}),
        ("t3", {"weights__state_bits": 8}),
    ],
)
def test_a_job_ends_in_a_checkpoint_that_loads(
    preset: str, changes: Any, model: Path, tmp_path: Path
) -> None:
    """The job itself compares what it reloads with what it made."""
    result = run(
        model, tmp_path / "out", preset, tuning__steps=2, solver__two_sided="true", **changes
    )
    assert result.exit_code == 0, result.output
    plain = run(model, tmp_path / "plain", preset, tuning__steps=2, **changes)
    assert plain.exit_code == 0, plain.output
    found, other = (read_json(tmp_path / name / "report.json") for name in ("out", "plain"))
    assert [layer["name"] for layer in found["layers"]] == [x["name"] for x in other["layers"]]
    assert found["layers"] != other["layers"]


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"solver.method": "rtn"}, "two_sided is of method=gptq"),
        ({"weights.format": "nvfp4"}, "two_sided rounds integers, not nvfp4"),
        ({"importance.strategy": "gradient", "importance.groups": 2}, "set importance.groups=1"),
        ({"solver.output_damping": 0}, "output_damping: 0.0 is not above 0"),
    ],
)
def test_what_it_does_not_go_with_is_refused(choices: dict[str, Any], says: str) -> None:
    floats = {"weights.bits": 4, "weights.group_size": 16, "weights.symmetric": True}
    if "weights.format" in choices:
        choices = floats | choices
    with pytest.raises(ValueError, match=says):
        load_recipe(None, {"solver.two_sided": True, **choices})


def test_sweeps_over_paths_are_refused() -> None:
    preset = Path(__file__).parents[2] / "configs" / "t3.yaml"
    with pytest.raises(ValueError, match=r"set solver\.refine_sweeps=0"):
        load_recipe(preset, {"solver.two_sided": True, "solver.refine_sweeps": 2})


def test_an_exl3_file_is_refused() -> None:
    preset = Path(__file__).parents[2] / "configs" / "exl3.yaml"
    with pytest.raises(ValueError, match=r"not for output\.format=exl3"):
        load_recipe(preset, {"solver.two_sided": True})


def test_without_native_code_it_is_refused_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotq.job.plan.is_native", lambda: False)
    result = run(model, tmp_path / "out", "w3", solver__two_sided="true")
    assert result.exit_code == 2
    assert "solver.two_sided needs numba" in result.stderr
    assert not (tmp_path / "out.partial").exists()
