"""What the documentation says is there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]
PAGES += sorted((ROOT / "kernels").glob("*.md"))


def strings() -> str:
    """Every piece of text in rotq's source, as one; neighbours are joined as Python joins them."""
    found = []
    for file in sorted((ROOT / "rotq").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def told_messages() -> Iterator[str]:
    """First cells of the tables that quote a line, in code."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").partition("## Exit")[0]
    yield from re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)


def test_messages_that_are_explained_are_told() -> None:
    known, told = strings(), list(told_messages())
    assert len(told) > 20
    assert [message for message in told if message not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else (page.parent / name).resolve()
        assert file.exists(), f"{target} leads nowhere"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in known, f"{target} is no heading"


def test_every_page_has_a_place_in_the_site() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = set(re.findall(r"[\w./-]+\.md", str(site["nav"])))
    own = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert own <= named
    assert all((ROOT / "docs" / name).is_file() or (ROOT / name).is_file() for name in named)


def test_presets_that_are_advised_exist() -> None:
    page = (ROOT / "docs/presets.md").read_text(encoding="utf-8").partition("## What moves")[0]
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ")][1:]
    names = {name.split()[0] for row in rows for name in re.findall(r"`([^`]+)`", row)}
    names -= {"--set"}
    assert len(names) > 12
    assert [name for name in names if not (ROOT / f"configs/{name}.yaml").is_file()] == []
