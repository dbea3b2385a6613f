"""Write docs/cli.md from the commands' own help. A test fails when the file is stale.

python scripts/cli_docs.py
"""

from collections.abc import Iterator
from pathlib import Path

import click

from rotq.cli.main import main as rotq

FILE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"


def render() -> str:
    """The whole page."""
    page = ["# Command line\n", "Written by `python scripts/cli_docs.py` from `rotq --help`.\n"]
    for context in _contexts(rotq, None, "rotq"):
        page.append(f"## {context.command_path}\n\n```text\n{context.get_help()}\n```\n")
    return "\n".join(page)


def _contexts(
    command: click.Command, parent: click.Context | None, name: str
) -> Iterator[click.Context]:
    context = click.Context(command, parent=parent, info_name=name, terminal_width=88)
    yield context
    if isinstance(command, click.Group):
        for child in sorted(command.commands):
            yield from _contexts(command.commands[child], context, child)


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
