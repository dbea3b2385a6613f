"""Pages that commands write: where they may, and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rotq.report.page import Page


def page_to_write(output: Path, models: Sequence[str], text: str | None) -> Path:
    """Where a page is written, before the work.

    Args:
        output: As given.
        models: That the command reads, as typed.
        text: The same; None where it reads none.

    Raises:
        RotqError: it cannot be written there, or there is something that is no page of rotq's.
    """
    from rotq.disk.destination import file_to_write, named_file
    from rotq.report.page import foreign

    read = {f"the checkpoint {name}": named_file(name) for name in models}
    read["the text"] = None if text is None else named_file(text)
    inputs = {words: place for words, place in read.items() if place is not None}
    return file_to_write(output, inputs, foreign)


def write_page(path: Path, page: Page) -> int:
    """Write a page whole; returns its bytes.

    Raises:
        RotqError: it cannot be written.
    """
    from rotq.disk.files import whole_file
    from rotq.report.page import render_page

    content = render_page(page).encode()
    with whole_file(path) as file:
        file.write(content)
    return len(content)
