"""Whether the machine code of a compiled library computes in floating point: read off its disassembly.

Moves of data through vector registers (movaps, movups, xorps and the like) count as integer: compilers use them for any
bytes. What converts, adds, multiplies, divides, compares or rounds floats is named, with the function that it is in.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from qgraph.errors import UserError

__all__ = ["FloatInstruction", "can_disassemble", "float_instructions", "scan"]

_SUPPORT = frozenset({"__truncsfhf2", "__extendhfsf2"})
"""What TVM's code generator adds to every library for half-precision floats; nothing calls it in integer code."""
_FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>[^>]+)>:$")
_INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\t(?P<mnemonic>\S+)(?P<operands>.*)$")
_CALL = re.compile(r"<(?P<name>[^>+@]+)(@plt)?>")

_X86_OPERATIONS = (
    "add|sub|addsub|hadd|hsub|mul|div|sqrt|rsqrt|rsqrt14|rsqrt28|rcp|rcp14|rcp28|min|max|cmp[a-z_]*|comi|ucomi|dp|round|rndscale"
    "|reduce|range|getexp|getmant|scalef|fixupimm|fpclass|f?n?m(add|sub)[a-z0-9]*|fmaddsub\\d*|fmsubadd\\d*|exp2"
)
_X86 = re.compile(
    rf"v?((({_X86_OPERATIONS})(ss|sd|ps|pd|sh|ph|bf16))"
    r"|cvt\w+"  # every conversion has a float at one end
    r"|dpbf16ps)"
    r"|f(?!ence|emms|xsave|xrstor|s?nop)[a-z0-9]+"  # of the old coprocessor
)
_ARM = re.compile(
    r"f(?!mov$)[a-z0-9]+|[us]cvtf|bf(dot|mmla|mlal[bt]|cvtn?2?)"  # AArch64: f..., but moves of bits
    r"|v(add|sub|mul|mla|mls|div|sqrt|cmpe?|cvt\w*|fma|fms|neg|abs|rint\w*)\.\w*f(16|32|64)\S*"  # 32-bit Arm
)


class FloatInstruction(NamedTuple):
    """An instruction on floats, and the function of the library that it is in."""

    function: str
    mnemonic: str


def can_disassemble() -> bool:
    """Tell whether the disassembler of the GNU or LLVM tools is installed."""
    return _disassembler() is not None


def float_instructions(library: Path) -> list[FloatInstruction]:
    """Return the floating-point instructions in the functions of a compiled library, in the order of its code.

    Args:
        library: a shared library of x86-64 or Arm.

    Raises:
        UserError: no disassembler is installed, or it cannot read the file.
    """
    tool = _disassembler()
    if tool is None:
        raise UserError("reading machine code needs objdump: install the GNU binutils or the LLVM tools")
    done = subprocess.run([tool, "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"{library} cannot be disassembled: {done.stderr.strip().splitlines()[-1:]}")
    return list(scan(done.stdout.splitlines()))


def _disassembler() -> str | None:
    return shutil.which("objdump") or shutil.which("llvm-objdump")


def scan(lines: Iterable[str]) -> Iterator[FloatInstruction]:
    """Yield the floating-point instructions of a disassembly as objdump prints it."""
    function, pattern = "", _X86
    for line in lines:
        if "file format" in line:
            pattern = _ARM if "aarch64" in line or "arm" in line else _X86
        elif found := _FUNCTION.match(line):
            function = found["name"]
        elif (found := _INSTRUCTION.match(line)) and function not in _SUPPORT:
            called = _CALL.search(found["operands"])
            if pattern.fullmatch(found["mnemonic"]) or (called is not None and called["name"] in _SUPPORT):
                yield FloatInstruction(function, found["mnemonic"])
