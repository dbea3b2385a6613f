"""The figures of ``compile_check`` on record: read, written, compared, and as a table."""

import json
from pathlib import Path
from typing import Any

import triton

REPORT = Path(__file__).with_name("report.json")
TABLE = Path(__file__).parents[2] / "COMPILE.md"

TOLERANCE = 1.05
"""Figures may grow by so much."""

Row = dict[str, Any]

HEADING = """# What the kernels compile to

Made by `python -m rotq_kernels.compile_check --update` with Triton {version} and no GPU: counts
are static, and occupancy and roofline are **modelled** from them (`compile_check/roofline.py`),
not measured. The tests fail where a figure gets worse.

- instr: instructions of the whole kernel; loop: those of its main loop, "-" where that was
  unrolled; all of them for runs of the Hadamard transform, which has no loop there
- instr/elem, int/elem, smem B/elem: lane-instructions of the main loop, those of the narrow pipe
  (integers and selects; on gfx942 every VALU instruction), and bytes of shared memory that load
  and store instructions pass (not what wgmma and tcgen05 read by themselves), for each packed
  element (key, value or weight); "-" where the loop is over something else
- spills: instructions that move registers to or from local memory
- shared KiB: of a block, and what one may have at most; the check fails above it. 99 KiB is what
  sm_86, sm_89 and sm_120 have
- modelled roofline: share of the memory bandwidth of A100-80, L40S, H100 SXM, B200, RTX 5090 or
  MI300X that the loop's instructions allow

"""

COLUMNS = {
    "kernel, case": lambda row: "",
    "target": lambda row: "",
    "registers": lambda row: str(row["registers"]),
    "spills": lambda row: str(row["spills"]),
    "shared KiB": lambda row: f"{row['shared'] / 1024:.1f} / {row['shared_limit'] // 1024}",
    "instr": lambda row: str(row["instructions"]),
    "loop": lambda row: str(row["loop_instructions"] or "-"),
    "instr/elem": lambda row: _figure(row, "instructions_per_element"),
    "int/elem": lambda row: _figure(row, "integer_per_element"),
    "smem B/elem": lambda row: _figure(row, "shared_per_element"),
    "modelled occupancy": lambda row: f"{100 * row['modelled_occupancy']:.0f} %",
    "modelled roofline": lambda row: (
        f"{100 * row['modelled_roofline']:.0f} %" if "modelled_roofline" in row else "-"
    ),
}


def read_report() -> dict[str, Row]:
    """Rows on record; none where there is no record."""
    if not REPORT.exists():
        return {}
    rows: dict[str, Row] = json.loads(REPORT.read_text(encoding="utf-8"))["rows"]
    return rows


def report_version() -> str:
    """The Triton that made the record."""
    version: str = json.loads(REPORT.read_text(encoding="utf-8"))["triton"]
    return version


def write_report(rows: dict[str, Row], names: set[str]) -> None:
    """Put rows on record, next to those there that are still among ``names``."""
    kept = {name: row for name, row in read_report().items() if name in names}
    rows = dict(sorted((kept | rows).items()))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    text = f'{{\n "triton": "{triton.__version__}",\n "rows": {{\n{lines}\n }}\n}}\n'
    REPORT.write_text(text, encoding="utf-8")
    TABLE.write_text(render_page(rows, triton.__version__), encoding="utf-8")


def render_page(rows: dict[str, Row], version: str) -> str:
    """COMPILE.md."""
    return HEADING.format(version=version) + render(rows)


def render(rows: dict[str, Row]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, row in rows.items():
        case, _, target = name.rpartition(" @ ")
        cells = [case, target, *(cell(row) for cell in list(COLUMNS.values())[2:])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def regressions(record: dict[str, Row], rows: dict[str, Row]) -> list[str]:
    """What got worse: more spills, or more than TOLERANCE of registers or loop instructions.

    A kernel that no SM could hold, or no block, is always named.
    """
    found = []
    for name, row in rows.items():
        if not row["modelled_occupancy"]:
            found.append(f"{name}: takes more registers or shared memory than there are")
        if row["shared"] > row["shared_limit"]:
            found.append(
                f"{name}: a launch would fail, a block may have {row['shared_limit']} bytes of "
                f"shared memory and this wants {row['shared']}"
            )
        old = record.get(name)
        if old is None:
            found.append(f"{name}: not on record, run compile_check --update")
            continue
        code = _cost(old, row)
        for key, factor in (("spills", 1.0), ("registers", TOLERANCE), (code, TOLERANCE)):
            if row[key] > factor * old[key]:
                found.append(f"{name}: {key} {row[key]}, was {old[key]}")
    return found


def _cost(old: Row, row: Row) -> str:
    """The figure to compare: loops may be unrolled more than they were, or entirely."""
    if "instructions_per_element" in old and "instructions_per_element" in row:
        return "instructions_per_element"
    looped = old["loop_instructions"] and row["loop_instructions"]
    return "loop_instructions" if looped else "instructions"


def _figure(row: Row, key: str) -> str:
    return f"{row[key]:.2f}" if key in row else "-"
