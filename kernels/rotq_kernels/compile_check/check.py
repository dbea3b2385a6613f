"""Compile every kernel for every target without a GPU, and compare with the figures on record.

    python -m rotq_kernels.compile_check [--json] [--update] [--only REGEX] [--target sm_90]

A module ``cases``, or ``*_cases``, lists what to compile in COMPILE_CASES, dicts with

    kernel      the triton.jit function (not the autotuned one)
    types       type of each argument, as "*bf16" or "i32"; pointers count as aligned
    constants   value of each constexpr
    name        unique in the module; made of the constants if left out
    num_warps, num_stages, enable_fp_fusion   4, 3 and True if left out
    divisible   names of integer arguments that are multiples of 16
    targets     names of TARGETS; all if left out
    elements    packed elements (keys and values, or weights) that a program treats in one round
                of its main loop; without it, figures per element are left out
    whole       True for a kernel without a loop: its figures per element are of all of it
    bits        bits of memory that each of these takes, 3.125 if left out
    headline    whether the quick check of the tests compiles it; the first of each kernel is

and gets a row per target: registers of a lane, spills (instructions that move registers to or
from local memory), bytes of shared memory, instructions; of the main loop, instructions, those of
the narrow pipe and bytes of shared memory, as they are and per element (times the lanes of the
program); and modelled, from ``roofline``: occupancy and share of the memory's bandwidth.
``--update`` writes report.json and kernels/COMPILE.md; otherwise a regression, that is a
spill or 5 % more of registers or loop instructions, makes the exit status 1. So does, always, more
shared memory than a block of the target may have.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import rotq_kernels
from rotq_kernels.compile_check.disassembly import (
    Listing,
    cubin_registers,
    disassemble,
    is_integer,
    is_spill,
    opcode_counts,
    read_amdgcn,
    shared_bytes,
)
from rotq_kernels.compile_check.report import REPORT, read_report, regressions, render, write_report
from rotq_kernels.compile_check.roofline import DEVICES, occupancy, roofline_share

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

Case = dict[str, Any]
Row = dict[str, Any]


def cases() -> Iterator[tuple[str, Case]]:
    """Names and cases of all modules; the first of each kernel is a headline."""
    for module in pkgutil.walk_packages(rotq_kernels.__path__, "rotq_kernels."):
        if module.name.startswith("rotq_kernels.compile_check"):
            continue
        seen: set[str] = set()
        for case in getattr(importlib.import_module(module.name), "COMPILE_CASES", []):
            constants = " ".join(f"{key}={value}" for key, value in case["constants"].items())
            first = case["kernel"].__name__ not in seen
            seen.add(case["kernel"].__name__)
            short = module.name.removeprefix("rotq_kernels.")
            name = f"{short}: {case.get('name', constants)}"
            yield name, {**case, "headline": case.get("headline", first)}


def row_names() -> set[str]:
    """Of all rows: "module: case @ target"."""
    return {
        f"{name} @ {target}" for name, case in cases() for target in case.get("targets", TARGETS)
    }


def check_case(case: Case, target: str) -> Row:
    """Compile for one target and count."""
    compiled = _compile(case, target)
    if "cubin" in compiled.asm:
        listing = disassemble(compiled.asm["cubin"])
        registers = cubin_registers(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        listing = read_amdgcn(text)
        registers = max(int(found) for found in re.findall(r"\.vgpr_count:\s+(\d+)", text))
    row = {
        "registers": registers,
        "spills": sum(map(is_spill, listing.instructions)),
        "shared": compiled.metadata.shared,
        "shared_limit": DEVICES[target].block_shared,
        "instructions": len(listing.instructions),
    }
    return row | _loop_figures(case, target, listing) | _occupancy(case, target, row)


def _compile(case: Case, target: str) -> Any:
    kernel, types, constants = case["kernel"], case["types"], case["constants"]
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    divisible = {name for name, kind in types.items() if kind.startswith("*")}
    divisible |= set(case.get("divisible", ()))
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(divisible)}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {
        "num_warps": case.get("num_warps", 4),
        "num_stages": case.get("num_stages", 3),
        "enable_fp_fusion": case.get("enable_fp_fusion", True),
    }
    return triton.compile(source, target=TARGETS[target], options=options)


def _loop_figures(case: Case, target: str, listing: Listing) -> Row:
    body = list(listing.instructions) if case.get("whole") else listing.main_loop()
    row: Row = {
        "loop_instructions": len(body),
        "loop_integer": sum(map(is_integer, body)),
        "loop_shared": sum(map(shared_bytes, body)),
    }
    elements = case.get("elements")
    if not elements or not body:
        return row
    device = DEVICES[target]
    lanes = case.get("num_warps", 4) * device.lanes
    names = ("instructions", "integer", "shared")
    each = {name: row[f"loop_{name}"] * lanes / elements for name in names}
    share = roofline_share(device, case.get("bits", 3.125), **each)
    return (
        row
        | {f"{name}_per_element": round(each[name], 3) for name in names}
        | {"modelled_roofline": round(share, 3)}
    )


def _occupancy(case: Case, target: str, row: Row) -> Row:
    share = occupancy(
        DEVICES[target],
        registers=row["registers"],
        shared=row["shared"],
        num_warps=case.get("num_warps", 4),
    )
    return {"modelled_occupancy": round(share, 3)}


def check_all(wanted: Callable[[str, Case, str], bool]) -> dict[str, Row]:
    """Rows by name; says on stderr what it is at."""
    rows = {}
    for name, case in cases():
        for target in case.get("targets", TARGETS):
            if wanted(name, case, target):
                sys.stderr.write(f"{name} @ {target}\n")
                rows[f"{name} @ {target}"] = check_case(case, target)
    return rows


def print_opcodes(pattern: str, target: str) -> None:
    """The instructions of main loops, most frequent first, for whoever tunes."""
    for name, case in cases():
        if re.search(pattern, name) and target in case.get("targets", TARGETS):
            compiled = _compile(case, target)
            cubin = compiled.asm.get("cubin")
            listing = disassemble(cubin) if cubin else read_amdgcn(compiled.asm["amdgcn"])
            body = listing.main_loop()
            counts = ", ".join(f"{opcode} {n}" for opcode, n in opcode_counts(body).most_common())
            sys.stdout.write(f"{name} @ {target}: {len(body)} of {len(listing.instructions)}\n")
            sys.stdout.write(f"  {counts}\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rotq_kernels.compile_check")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--update", action="store_true", help=f"write {REPORT.name}, COMPILE.md")
    parser.add_argument("--headlines", action="store_true", help="headline cases only")
    parser.add_argument("--only", default="", metavar="REGEX", help='"module: case" to compile')
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be repeated")
    parser.add_argument("--opcodes", action="store_true", help="print the main loops' opcodes")
    return parser.parse_args()


def main() -> int:
    """Exit status: 1 where a figure got worse."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.stderr.write("compile_check: kernels do not compile under TRITON_INTERPRET=1\n")
        return 2
    given = _arguments()
    targets = given.target or list(TARGETS)
    if given.opcodes:
        for target in targets:
            print_opcodes(given.only, target)
        return 0

    def wanted(name: str, case: Case, target: str) -> bool:
        listed = target in targets and bool(re.search(given.only, name))
        return listed and (case["headline"] or not given.headlines)

    rows = check_all(wanted)
    if given.update:
        write_report(rows, row_names())
    worse = regressions(read_report(), rows)
    sys.stdout.write(json.dumps(rows, indent=1) + "\n" if given.json else render(rows))
    sys.stderr.writelines(f"worse: {line}\n" for line in worse)
    return 1 if worse else 0
