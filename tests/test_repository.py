"""Files that strangers look for agree with the package."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import rotq

ROOT = Path(__file__).parents[1]


def test_the_citation_is_of_this_version_and_licence() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["version"] == rotq.__version__
    assert cited["license"] == project["license"]
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("paper", ["2501.13987", "2503.01820", "2603.26110"])
def test_the_papers_are_cited(paper: str) -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    found = [one for one in cited["references"] if one["identifiers"][0]["value"].endswith(paper)]
    assert len(found) == 1
    assert all({"family-names", "given-names"} == set(author) for author in found[0]["authors"])


def test_ci_and_hooks_run_what_is_there() -> None:
    """Commands of the workflow and of the hooks exist here or in the environment of ``setup``."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for step in workflow["jobs"]["ci"]["steps"] if "run" in step]
    assert steps == [".ci/run"]
    assert (ROOT / ".ci/run").is_file()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    tools = {hook["entry"].split()[0] for repo in hooks["repos"] for hook in repo["hooks"]}
    used = set(re.findall(r"\$\(BIN\)/(ruff|mypy)", (ROOT / "Makefile").read_text()))
    assert tools == {f".venv/bin/{tool}" for tool in used}
