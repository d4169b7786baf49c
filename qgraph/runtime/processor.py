"""What this processor can do, as far as the system tells."""

from __future__ import annotations

import platform
import re
from pathlib import Path

__all__ = ["FLAGS", "is_arm", "lacks_integer_dot_products", "processor_flags", "product_processor"]

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve")
"""Instructions that integer and low-precision kernels look for, as Linux names them (x86, then Arm)."""
_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}
_AVX512_CORE = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_ARM = ("aarch64", "arm64")


def processor_flags() -> tuple[str, ...]:
    """Return those of FLAGS that the processor has; none where the system does not tell."""
    present = _every_flag()
    return tuple(flag for flag in FLAGS if flag in present)


def _every_flag() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


def product_processor() -> str:
    """Return which of `qgraph.capabilities.PROCESSORS` this one is to kernels that multiply bytes; '' for others."""
    flags = set() if is_arm() else _every_flag()
    if _DOT_PRODUCTS & flags:
        return "vnni"
    return "avx512" if flags >= _AVX512_CORE else "avx2" if "avx2" in flags else ""


def is_arm() -> bool:
    """Tell whether this is a 64-bit Arm processor."""
    return platform.machine().lower() in _ARM


def lacks_integer_dot_products() -> bool:
    """Tell whether this is known to be an x86 processor that adds products of bytes in 16 bits, which saturates."""
    flags = processor_flags()
    return not is_arm() and bool(flags) and not _DOT_PRODUCTS & set(flags)
