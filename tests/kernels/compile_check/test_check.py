"""The figures on record: complete, rendered, compared; headline kernels still compile to them."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import triton

from rotq_kernels.compile_check import report as compile_report
from rotq_kernels.compile_check.check import TARGETS, cases, row_names
from rotq_kernels.compile_check.report import (
    TABLE,
    read_report,
    regressions,
    render,
    render_page,
    report_version,
)

ROW = {
    "registers": 100,
    "spills": 0,
    "shared": 2048,
    "shared_limit": 99 * 1024,
    "instructions": 1000,
    "loop_instructions": 400,
    "loop_integer": 100,
    "loop_shared": 160,
    "instructions_per_element": 4.0,
    "integer_per_element": 1.0,
    "shared_per_element": 1.6,
    "modelled_roofline": 0.9,
    "modelled_occupancy": 0.25,
}


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        ({}, None),
        ({"registers": 105}, None),
        ({"registers": 106}, "registers 106, was 100"),
        ({"spills": 1}, "spills 1, was 0"),
        ({"instructions_per_element": 4.3}, "instructions_per_element 4.3, was 4.0"),
        # unrolled twice as far, at no more cost
        ({"loop_instructions": 800}, None),
        ({"registers": 90, "instructions_per_element": 3.0}, None),
    ],
)
def test_what_counts_as_a_regression(change: dict[str, float], worse: str | None) -> None:
    found = regressions({"a @ sm_90": ROW}, {"a @ sm_90": ROW | change})
    assert found == ([] if worse is None else [f"a @ sm_90: {worse}"])


def test_no_spill_is_tolerated_on_top_of_others() -> None:
    assert regressions({"a": ROW | {"spills": 40}}, {"a": ROW | {"spills": 41}})
    assert not regressions({"a": ROW | {"spills": 40}}, {"a": ROW | {"spills": 40}})


def test_a_kernel_must_fit_the_device() -> None:
    row = ROW | {"modelled_occupancy": 0.0}
    assert regressions({"a": row}, {"a": row}) == [
        "a: takes more registers or shared memory than there are"
    ]


def test_a_block_must_fit_the_device() -> None:
    row = ROW | {"shared": 100 * 1024}
    (found,) = regressions({"a": row}, {"a": row})
    assert found.startswith("a: a launch would fail, a block may have 101376 bytes")


def test_every_kernel_on_record_fits() -> None:
    assert not regressions(read_report(), read_report())


def test_an_update_keeps_what_still_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_report, "REPORT", tmp_path / "report.json")
    monkeypatch.setattr(compile_report, "TABLE", tmp_path / "table.md")
    compile_report.write_report({"m: a @ sm_90": ROW, "m: gone @ sm_90": ROW}, set())
    names = {"m: a @ sm_90", "m: b @ sm_80"}
    compile_report.write_report({"m: b @ sm_80": ROW | {"spills": 3}}, names)
    assert compile_report.read_report() == {
        "m: a @ sm_90": ROW,
        "m: b @ sm_80": ROW | {"spills": 3},
    }
    page = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert page == render_page(compile_report.read_report(), triton.__version__)


def test_without_elements_the_loop_counts() -> None:
    row = {key: value for key, value in ROW.items() if not key.endswith("per_element")}
    assert not regressions({"a": row}, {"a": row | {"loop_instructions": 420}})
    assert regressions({"a": row}, {"a": row | {"loop_instructions": 421}})
    assert regressions({"a": ROW}, {"a": row | {"loop_instructions": 421}})


def test_without_a_loop_the_kernel_counts() -> None:
    row = {key: value for key, value in ROW.items() if not key.endswith("per_element")}
    unrolled = row | {"loop_instructions": 0}
    assert not regressions({"a": unrolled}, {"a": unrolled | {"instructions": 1050}})
    assert not regressions({"a": unrolled}, {"a": row | {"instructions": 900}})
    assert regressions({"a": unrolled}, {"a": unrolled | {"instructions": 1051}})
    assert regressions({"a": row}, {"a": unrolled | {"instructions": 1051}})


def test_a_case_must_be_on_record() -> None:
    assert "not on record" in regressions({}, {"a @ sm_90": ROW})[0]


def test_table() -> None:
    lines = render({"m: k3 @ sm_90": ROW}).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "m: k3", "sm_90", "100", "0", "2.0 / 99", "1000",
        "400", "4.00", "1.00", "1.60", "25 %", "90 %",
    ]  # fmt: skip


def test_names_are_unique_on_each_target() -> None:
    rows = Counter(
        (name, target) for name, case in cases() for target in case.get("targets", TARGETS)
    )
    assert [row for row, number in rows.items() if number > 1] == []


def test_every_case_is_on_record() -> None:
    assert row_names() == set(read_report()), "run python -m rotq_kernels.compile_check --update"


def test_page_is_the_record() -> None:
    assert TABLE.read_text(encoding="utf-8") == render_page(read_report(), report_version())


def run_check(*arguments: str, interpret: bool = False) -> "subprocess.CompletedProcess[str]":
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, "-m", "rotq_kernels.compile_check", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_interpreted_kernels_do_not_compile() -> None:
    done = run_check(interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


@pytest.mark.slow
def test_headline_kernels_compile_to_what_is_on_record() -> None:
    """The first case of each kernel, for a GPU of NVIDIA's and one of AMD's."""
    if triton.__version__ != report_version():
        pytest.skip(f"figures are of Triton {report_version()}, this is {triton.__version__}")
    done = run_check("--headlines", "--target", "sm_90", "--target", "gfx942", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) >= 2
