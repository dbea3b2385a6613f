"""Figures beside a model card."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from job_reports import make_report

from rotq.checkpoint.card_figures import add_figures
from rotq.report import JobReport

CHANGE = {"before": {"max_over_rms": 9.0}, "after": {"max_over_rms": 3.0}}


@pytest.mark.parametrize(
    ("report", "number"),
    [(make_report(), 2), (make_report(flatness={"model.layers.0.down": CHANGE}), 3)],
    ids=["weights", "flatness"],
)
def test_a_card_shows_files_that_are_there(tmp_path: Path, report: JobReport, number: int) -> None:
    (tmp_path / "README.md").write_text("# a model\n")
    add_figures(tmp_path, report)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# a model\n\n## What was lost where\n")
    names = re.findall(r"!\[[^\]]+\]\((.*?)\)", card)
    assert len(names) == number
    assert {*names, "README.md"} == {file.name for file in tmp_path.iterdir()}
    for name in names:
        root = ElementTree.fromstring((tmp_path / name).read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "README.md").write_text("")
        add_figures(folder, make_report(seconds=float(len(found))))
        found.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert found[0] == found[1]
