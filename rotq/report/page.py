"""One HTML page of checkpoints: no script, no network, light and dark as the reader has it.

What was not measured has a sentence in place of its figure, which says what would measure it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rotq.disk.destination import without_mark
from rotq.report import figures
from rotq.report.compare_tables import compare_rows, comparison_notes
from rotq.report.results import JobReport
from rotq.report.svg import STYLE, Chart
from rotq.report.tables import report_rows

GENERATOR = '<meta name="generator" content="rotq">'
"""The mark by which rotq knows a page of its own."""

_CSS = """
:root{color-scheme:light dark;--back:#f6f5f1;--card:#fff;--ink:#1c1e22;--soft:#5b606b;
--line:#dddad2;--strong:#0b5d57}
@media (prefers-color-scheme:dark){:root{--back:#16181d;--card:#1f232b;--ink:#e8e6e0;--soft:#a3a9b6;
--line:#343a46;--strong:#6fd3c7}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:56rem;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;letter-spacing:-.02em;margin:0 0 .25rem}
h2{font-size:1.2rem;margin:2.5rem 0 .75rem}
h3{font-size:1rem;margin:1.25rem 0 .5rem;overflow-wrap:anywhere}
p{margin:.25rem 0 .75rem;color:var(--soft)}
section>.card{background:var(--card);border:1px solid var(--line);border-radius:.75rem;
padding:1rem;margin:0 0 1rem;overflow-x:auto}
figure{margin:0}
svg{width:100%;height:auto;display:block;min-width:34rem}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.35rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child{text-align:left;color:var(--soft);font-weight:400;white-space:nowrap}
thead th{font-weight:600;overflow-wrap:anywhere;color:var(--ink)}
table.facts td{text-align:left;overflow-wrap:anywhere}
tr:last-child td{border-bottom:0}
.texts{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr))}
.texts pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;
font:.85rem/1.5 ui-monospace,monospace}
.texts .prompt{color:var(--soft)}
"""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and what each model writes behind it, by name."""

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows; parts that were not measured are None or empty."""

    title: str
    jobs: Mapping[str, JobReport | None] = field(default_factory=dict)
    """By checkpoint; None where rotq did not write it."""
    comparison: Mapping[str, Any] | None = None
    """Of ``rotq compare``."""
    positions: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """KL by position, by checkpoint."""
    kv: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Error of each layer's attention with a packed cache, by checkpoint."""
    kv_preset: str = ""
    sample: Sample | None = None


def render_page(page: Page) -> str:
    """The whole file."""
    body = "".join(_sections(page))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(page.title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{_CSS}{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(page.title)}</h1>\n"
        f"{body}</main>\n</body>\n</html>\n"
    )


def foreign(path: Path) -> str | None:
    """What makes an existing path no page of rotq's, in words; None if it is one."""
    return without_mark(path, GENERATOR.encode(), "page")


def _sections(page: Page) -> Iterator[str]:
    if page.comparison is not None:
        yield from _compared(page.comparison, page.positions)
    elif page.jobs:
        yield _section("Quality", "Not measured: give --reference MODEL and --text FILE.")
    for name, job in page.jobs.items():
        yield from _job(name, job)
    if page.kv:
        told = (
            f"Preset {page.kv_preset}: relative squared error of each layer's attention output, "
            "with the same inputs."
        )
        yield _section("Packed keys and values", told, _figure(figures.kv_figure(page.kv)))
    elif page.jobs:
        yield _section("Packed keys and values", "Not measured: give --kv PRESET.")
    if page.sample is not None:
        yield _sample(page.sample)


def _compared(found: Mapping[str, Any], positions: Mapping[str, Sequence[float]]) -> Iterator[str]:
    checkpoints = found["checkpoints"]
    rows = [(label, cells) for label, cells in compare_rows(checkpoints) if any(cells)]
    table = _table([one["name"] for one in checkpoints], rows)
    notes = _facts(comparison_notes(found))
    yield _section("Quality and size", "", _card(table), _card(notes))
    yield _section("Size against KL", "", _figure(figures.size_figure(checkpoints)))
    told = "An interval that holds 0 says that a checkpoint is not told from the original."
    yield _section("How sure", told, _figure(figures.ratio_figure(checkpoints)))
    if positions:
        told = "Mean KL(original || checkpoint) at each position of a window, over all windows."
        chart = figures.positions_figure(positions)
        yield _section("KL over positions", told, _figure(chart))


def _job(name: str, job: JobReport | None) -> Iterator[str]:
    if job is None:
        yield _section(name, "rotq did not write this checkpoint: it has no report.json.")
        return
    yield _section(f"What was done: {name}", "", _card(_facts(report_rows(job))))
    told = "tr(dW H dW^T) / tr(W H W^T), H the mean x x^T of calibration tokens, or I without them."
    yield _section("Error of each layer", told, _figure(figures.error_figure(job)))
    yield _section("Bits", "", _figure(figures.bits_figure(job)))
    if job.flatness:
        told = "How even the inputs of the layers are; lower is easier to round."
        yield _section("Flatness", told, _figure(figures.flatness_figure(job)))
    else:
        told = "Not measured: this job neither rotates nor rounds activations."
        yield _section("Flatness", told)


def _sample(sample: Sample) -> str:
    columns = "".join(
        f'<div><h3>{escape(name)}</h3><pre><span class="prompt">{escape(sample.prompt)}</span>'
        f"{escape(text)}</pre></div>"
        for name, text in sample.texts.items()
    )
    told = "The most likely continuation of one prompt, token by token."
    return _section("A text, side by side", told, _card(f'<div class="texts">{columns}</div>'))


def _section(title: str, told: str, *parts: str) -> str:
    said = f"<p>{escape(told)}</p>\n" if told else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{said}{''.join(parts)}</section>\n"


def _card(content: str) -> str:
    return f'<div class="card">{content}</div>\n'


def _figure(chart: Chart) -> str:
    return _card(f"<figure>{chart.svg()}</figure>")


def _table(names: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = "".join(
        "".join((f"<tr><td>{escape(label)}</td>", *map(_cell, cells), "</tr>"))
        for label, cells in rows
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(words: str) -> str:
    return f"<td>{escape(words or '-')}</td>"


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f'<table class="facts"><tbody>{lines}</tbody></table>'
