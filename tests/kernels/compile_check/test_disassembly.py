"""Loops and instructions read off listings written by hand, and what is modelled from them."""

import pytest

from rotq_kernels.compile_check.disassembly import (
    Instruction,
    is_integer,
    is_matrix,
    is_spill,
    opcode_counts,
    read_amdgcn,
    read_sass,
    shared_bytes,
)
from rotq_kernels.compile_check.roofline import DEVICES, occupancy, roofline_share


def sass(*lines: str) -> str:
    """As nvdisasm writes: labels as they are, instructions with addresses."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/   {line} ;"
        for i, line in enumerate(lines)
    )


WORK = ["IADD3 R1, R1, 0x1, RZ", "LDS.128 R4, [R2]", "@P0 FFMA R8, R4, R5, R8", "NOP"] * 8
WAIT = [".L_x_2:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R0", "@!P1 BRA `(.L_x_2)"]
KERNEL = sass(
    "S2R R0, SR_TID.X",
    "STL [R1+0x8], R6",
    "@P0 BRA `(.L_x_9)",
    ".L_x_1:",
    *WORK,
    *WAIT,
    "HMMA.16816.F32 R8, R4, R6, R8",
    "@!P0 BRA `(.L_x_1)",
    # a longer loop later, also with a matrix instruction: the masked tail
    ".L_x_3:",
    *WORK,
    *WORK,
    "HGMMA.64x16x16.F32 R8, R4, gdesc[UR4], R8",
    "@!P0 BRA `(.L_x_3)",
    ".L_x_9:",
    "EXIT",
    ".L_x_10:",
    "BRA `(.L_x_10)",
)


def test_main_loop_is_the_first_that_multiplies() -> None:
    listing = read_sass(KERNEL)
    assert [b - a + 1 for a, b in listing.loops()] == [28, 2, 50, 1]
    body = listing.main_loop()
    assert len(body) == 28
    assert opcode_counts(body) == {
        "IADD3": 8,
        "LDS": 8,
        "FFMA": 8,
        "SYNCS": 1,
        "BRA": 2,
        "HMMA": 1,
    }
    assert sum(map(is_integer, body)) == 8
    assert sum(map(shared_bytes, body)) == 8 * 16
    assert sum(map(is_spill, listing.instructions)) == 1


def test_of_nested_loops_the_one_with_the_work() -> None:
    rare = [".L_x_2:", *WORK[:20], "@P1 BRA `(.L_x_2)"]
    mostly_outer = sass(".L_x_1:", *WORK, *rare, *WORK, "@P0 BRA `(.L_x_1)")
    assert len(read_sass(mostly_outer).main_loop()) == 24 + 16 + 24 + 1
    mostly_inner = sass(
        ".L_x_1:", "MOV R1, R2", ".L_x_2:", *WORK, "@P1 BRA `(.L_x_2)", "BRA `(.L_x_1)"
    )
    assert len(read_sass(mostly_inner).main_loop()) == 25


def test_no_loop() -> None:
    assert read_sass(sass(*WORK, "EXIT", ".L_x_1:", "BRA `(.L_x_1)")).main_loop() == []


@pytest.mark.parametrize(
    ("opcode", "modifiers", "number"),
    [
        ("LDS", "", 4),
        ("LDS", ".64", 8),
        ("STS", ".128", 16),
        ("STS", ".U8", 1),
        ("LDS", ".U16", 2),
        ("LDSM", ".16.M88.4", 16),
        ("LDSM", ".16.MT88.2", 8),
        ("LDSM", ".16.M88", 4),
        ("LDGSTS", ".E.BYPASS.128", 16),
        ("LDG", ".E.128", 0),
        ("ds_read_u16", "", 2),
        ("ds_write_b64", "", 8),
        ("ds_read2st64_b64", "", 16),
        ("ds_read_b128", "", 16),
        ("v_add_f32", "", 0),
    ],
)
def test_bytes_of_shared_memory(opcode: str, modifiers: str, number: int) -> None:
    assert shared_bytes(Instruction(opcode, modifiers)) == number


def test_kinds() -> None:
    for name in ("LOP3", "SHF", "PRMT", "IADD3", "ISETP", "SEL", "v_perm_b32"):
        assert is_integer(Instruction(name)), name
    for name in ("IMAD", "FFMA", "HFMA2", "LDS", "UIADD3", "v_mfma_f32_16x16x16_f16", "s_add_i32"):
        assert not is_integer(Instruction(name)), name
    for name in ("HMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA", "v_mfma_f32_16x16x16_f16"):
        assert is_matrix(Instruction(name)), name
    for name in ("STL", "LDL", "scratch_load_dword"):
        assert is_spill(Instruction(name)), name
    assert not is_spill(Instruction("LDG"))


AMD = """
k:
\ts_load_dword s0, s[4:5], 0x0
\ts_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
{work}
\ts_nop 0
\ts_cbranch_scc0 .LBB0_1
.LBB0_2:
\ts_endpgm
.Lfunc_end0:
\tv_not_code v0
"""


def test_amd_listing() -> None:
    work = "\n".join(["\tv_add_u32_e32 v1, 1, v1", "\tds_read_b128 v[0:3], v4"] * 10)
    listing = read_amdgcn(AMD.format(work=work))
    body = listing.main_loop()
    assert len(body) == 21
    assert len(listing.instructions) == 24
    assert sum(map(is_integer, body)) == 10
    assert sum(map(shared_bytes, body)) == 160


def test_budgets_are_those_of_the_research() -> None:
    """kv.md 4.1: elements per clock and SM at 3.25 bits; 4.2: a peer at 13.4 per head, 4 heads."""
    assert DEVICES["sm_90"].elements_per_clock(3.25) == pytest.approx(35.6, abs=0.05)
    assert DEVICES["sm_80"].elements_per_clock(3.25) == pytest.approx(33.0, abs=0.05)
    share = roofline_share(DEVICES["sm_90"], 3.25, instructions=4 * 13.4, integer=4 * 5.0, shared=0)
    assert share == pytest.approx(0.067, abs=0.001)
    bound_by_integer = roofline_share(
        DEVICES["sm_90"], 3.25, instructions=3.6, integer=3.6, shared=0
    )
    assert bound_by_integer == pytest.approx(0.5, abs=0.01)
    bound_by_shared = roofline_share(DEVICES["sm_90"], 3.25, instructions=1, integer=1, shared=7.2)
    assert bound_by_shared == pytest.approx(0.5, abs=0.01)
    assert roofline_share(DEVICES["sm_90"], 3.25, instructions=1, integer=1, shared=1) == 1


def test_occupancy() -> None:
    sm_90 = DEVICES["sm_90"]
    # 65536 registers hold 8 blocks of 128 threads with 64; 228 KiB hold 4 of 56 KiB
    assert occupancy(sm_90, registers=64, shared=0, num_warps=4) == 0.5
    assert occupancy(sm_90, registers=63, shared=0, num_warps=4) == 0.5
    # 81 count as 88: 23 warps fit
    assert occupancy(sm_90, registers=81, shared=0, num_warps=4) == 5 * 4 / 64
    assert occupancy(sm_90, registers=32, shared=56 * 1024, num_warps=4) == 0.25
    assert occupancy(sm_90, registers=16, shared=0, num_warps=4) == 1
    assert occupancy(sm_90, registers=16, shared=0, num_warps=1) == 0.5
    # 512 vector registers a lane and SIMD, 4 SIMDs: 2 waves of 256 on each
    assert occupancy(DEVICES["gfx942"], registers=256, shared=0, num_warps=4) == 8 / 32
