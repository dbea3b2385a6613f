"""Text for people in columns, at most 80 wide."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 80
"""Characters of a line."""


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """Labels and texts in two columns; long texts wrap under their own column."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, text)
    return render(table)


def make_table(*headers: str) -> Table:
    """An empty table: the first column to the left, figures to the right, long cells wrapped."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", overflow="fold")
    return table


def render(table: Table) -> str:
    """Plain lines without colors, whatever the terminal.

    Names and notes of a checkpoint are foreign text: brackets in them are no markup, and what would
    command a terminal is spelled.
    """
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(
        file=buffer, width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False
    )
    console.print(table)
    lines = buffer.getvalue().split("\n")
    return "".join(f"{printable(line).rstrip()}\n" for line in lines[:-1])


def printable(line: str) -> str:
    """The line, with a code in place of each character that is no letter, mark or space."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
