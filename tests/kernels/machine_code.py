"""What Hopper's machine code does to registers that a product still reads.

A product of a warp group (HGMMA) whose left operand lies in registers reads them while the program goes on, until a
WARPGROUP.DEPBAR that waits for it. Nothing else in the machine holds back an instruction that writes them meanwhile
(PTX ISA, wgmma.wait_group: undefined behaviour), and whether it comes too early depends on what else the processor does
at the time: a kernel can pass every test alone and be wrong on a busy card.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton

__all__ = ["early_writes"]

_DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
_PRODUCT = re.compile(r"HGMMA\S* R\d+, R(\d+),")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)")
_JUMP = re.compile(r"BRA\S* .*?(\.L_x_\w+)")
_LEFT = 4
"""Registers of a left operand: 64 rows of 32 bytes, in 128 threads."""
_MOST_GROUPS = 8
"""Products committed after one, past which they are no longer told apart."""
_NO_RESULT = (
    "ST",
    "RED",
    "BAR",
    "BRA",
    "EXIT",
    "LDGSTS",
    "LDGDEPBAR",
    "DEPBAR",
    "WARP",
    "HGMMA",
    "MEMBAR",
    "CCTL",
    "NOP",
)


def early_writes(cubin: bytes) -> list[str]:
    """Instructions that write a register which a product in flight reads, on any path through the program.

    Args:
        cubin: machine code for sm_90.

    Returns:
        for each, the product and the instruction; none where the code is right.
    """
    code, labels = _instructions(cubin)
    found = []
    for start, product in enumerate(code):
        operand = _PRODUCT.search(product)
        if operand is None:
            continue
        first = int(operand[1])
        registers = set(range(first, first + _LEFT))
        # (instruction, groups of products committed after this one's)
        seen: set[tuple[int, int]] = set()
        todo = [(start + 1, 0 if "gsb0" in product else -1)]
        while todo:
            place = todo.pop()
            at, newer = place
            if at >= len(code) or place in seen or newer > _MOST_GROUPS:
                continue
            seen.add(place)
            now = code[at]
            wait = _WAIT.search(now)
            if wait and newer >= int(wait[1], 16):
                continue
            if registers & _written(now):
                found.append(f"{product}  then  {now}")
            newer += "HGMMA" in now and "gsb0" in now
            jump = _JUMP.search(now)
            if jump:
                todo.append((labels[jump[1]], newer))
            if now.startswith("@") or not (jump or now.startswith("EXIT")):
                todo.append((at + 1, newer))
    return found


def _instructions(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """The instructions, and where labels point."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([_DISASSEMBLER, "-c", file.name], capture_output=True, text=True, check=True)
    code: list[str] = []
    labels = {}
    for line in run.stdout.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    return code, labels


def _written(instruction: str) -> set[int]:
    """The registers that an instruction writes: its first operand, after predicates, and those that follow it."""
    name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
    if name.startswith(_NO_RESULT):
        return set()
    for operand in operands.split(","):
        register = re.fullmatch(r"\s*R(\d+)(\.\w+)?", operand)
        if register:
            wide = re.search(r"\.128|LDSM\S*\.4", name), re.search(r"\.64|\.WIDE|LDSM\S*\.2", name)
            count = 4 if wide[0] else 2 if wide[1] else 1
            return set(range(int(register[1]), int(register[1]) + count))
        if not re.fullmatch(r"\s*U?PT?\d*", operand):
            return set()
    return set()
