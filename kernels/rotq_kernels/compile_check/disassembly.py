"""What the compiler made of a kernel: its instructions, its loops and what they move.

NVIDIA's SASS comes from the nvdisasm in the triton wheel, AMD's assembly from the compiler.
Counts are static: an instruction counts once each time its loop goes around, whatever its
predicate.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton

SMALLEST_LOOP = 16
"""Shorter loops only wait, for a barrier or a tensor core."""

SASS_LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)([\w.]*)\s*(.*?)\s*;")
SASS_TARGET = re.compile(r"`\((\.L\w+)\)")
LABEL = re.compile(r"(\.L\w+):")
AMD_LINE = re.compile(r"\s+((?:[sv]|ds|buffer|global|flat|scratch)_\w+)\s*(.*)")

SASS_INTEGER = re.compile(
    "LOP|SHF|IADD|PRMT|ISETP|LEA|SEL|FSEL|FMNMX|FSETP|IMNMX|VIMNMX|IABS|SGXT|BMSK|VIADD"
)
"""On the pipe of 64 lanes per clock; IMAD goes through the FMA pipe."""

SASS_MATRIX = re.compile("[HIQD]?MMA|HGMMA|IGMMA|QGMMA|UTC")
SASS_SHARED = re.compile("LDS|STS|LDSM|STSM|LDGSTS|ATOMS")
SASS_SPILL = re.compile("STL|LDL")


@dataclass(frozen=True)
class Instruction:
    """One line; ``opcode`` has no modifiers, ``target`` is the label that it may jump to."""

    opcode: str
    modifiers: str = ""
    target: str = ""


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions, and at which of them each label stands."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each loop, in the order of the code."""
        last_of: dict[int, int] = {}
        for i, instruction in enumerate(self.instructions):
            head = self.labels.get(instruction.target, i + 1)
            if head <= i:
                last_of[head] = i
        return sorted(last_of.items())

    def main_loop(self) -> list[Instruction]:
        """The loop that does the work: the first with matrix instructions, else the longest.

        Of nested loops the inner one, if it has half of the instructions: others only wait, or
        treat a rare case. Empty where no loop has ``SMALLEST_LOOP`` instructions.
        """
        large = [(a, b) for a, b in self.loops() if b - a + 1 >= SMALLEST_LOOP]
        inner = [
            self.instructions[a : b + 1]
            for a, b in large
            if not any(
                a <= c and d <= b and (c, d) != (a, b) and 2 * (d - c) >= b - a for c, d in large
            )
        ]
        for body in inner:
            if any(is_matrix(instruction) for instruction in body):
                return body
        return max(inner, key=len, default=[])


def is_matrix(instruction: Instruction) -> bool:
    """Whether it runs on the tensor cores."""
    name = instruction.opcode
    return bool(SASS_MATRIX.fullmatch(name) or name.startswith(("UTC", "v_mfma")))


def is_integer(instruction: Instruction) -> bool:
    """Whether it takes the narrow pipe: integers and selects on NVIDIA, any VALU on AMD."""
    name = instruction.opcode
    if name.startswith("v_"):
        return not is_matrix(instruction)
    return bool(SASS_INTEGER.match(name))


def is_spill(instruction: Instruction) -> bool:
    """Whether it moves a register to or from local memory."""
    return bool(
        SASS_SPILL.fullmatch(instruction.opcode) or instruction.opcode.startswith("scratch_")
    )


def shared_bytes(instruction: Instruction) -> int:
    """Bytes of shared memory that each lane reads or writes."""
    name, modifiers = instruction.opcode, instruction.modifiers
    if name.startswith("ds_"):
        width = re.search(r"_[bu](\d+)", name)
        return int(width[1]) // 8 * (2 if "2" in name.split("_b")[0] else 1) if width else 0
    if not SASS_SHARED.fullmatch(name):
        return 0
    if name in ("LDSM", "STSM"):
        matrices = re.search(r"\.(?:M[T0-9]+\.)?(\d)$", modifiers)
        return 4 * int(matrices[1]) if matrices else 4
    for suffix, number in ((".128", 16), (".64", 8), ("16", 2), ("8", 1)):
        if modifiers.endswith(suffix):
            return number
    return 4


def opcode_counts(instructions: Iterable[Instruction]) -> Counter[str]:
    """How often each opcode, modifiers dropped."""
    return Counter(instruction.opcode for instruction in instructions)


def read_sass(text: str) -> Listing:
    """The listing of ``nvdisasm -c``; padding after the end is a loop of one and no harm."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (found := SASS_LINE.search(line)) and found[1] != "NOP":
            target = SASS_TARGET.search(found[3])
            jumps = target is not None and found[1] == "BRA"
            instructions.append(
                Instruction(found[1], found[2], target[1] if target and jumps else "")
            )
    return Listing(instructions, labels)


def read_amdgcn(text: str) -> Listing:
    """The assembly of the one function."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.split(".Lfunc_end0")[0].splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (found := AMD_LINE.match(line)) and found[1] != "s_nop":
            jumps = found[1].startswith(("s_branch", "s_cbranch"))
            instructions.append(Instruction(found[1], "", found[2].split()[0] if jumps else ""))
    return Listing(instructions, labels)


def disassemble(cubin: bytes) -> Listing:
    """SASS of a CUDA binary with one kernel."""
    text = _run_tool("nvdisasm", ["-c"], cubin)
    return read_sass(text)


def cubin_registers(cubin: bytes) -> int:
    """Registers of each thread."""
    found = re.search(r"REG:(\d+)", _run_tool("cuobjdump", ["-res-usage"], cubin))
    assert found is not None, "cuobjdump named no registers"
    return int(found[1])


def _run_tool(name: str, options: list[str], cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), *options, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout
