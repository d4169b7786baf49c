"""float16 in ONNX Runtime on the CPU.

What there is depends on the processor. On x86 the CPU provider has next to no kernels for float16: a float16 model runs
in float32 between Casts, slower than float32. `cpu-fp16` therefore keeps activations in float32 there and stores the
weights in float16, which are widened once at load: half the size at the speed of `cpu-fp32`. With `cpu=neon`, for
64-bit Arm, where convolutions, products and much else have float16 kernels, the whole model computes in float16, but
for what would overflow.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from qgraph.pipeline import Pipeline
from qgraph.runtime.processor import is_arm
from qgraph.targets.cpu import CpuFp32

__all__ = ["CpuFp16"]


@dataclasses.dataclass(frozen=True)
class CpuFp16(CpuFp32):
    """float16 weights on the CPU, and float16 arithmetic where it has kernels for it."""

    name: ClassVar[str] = "cpu-fp16"
    summary: ClassVar[str] = "float16 weights, widened at load to float32 arithmetic; all float16 for Arm (cpu=neon)"
    cpu: Literal["", "neon"] = dataclasses.field(
        default="", metadata={"help": "processor to compile for; neon: float16 arithmetic, of which x86 has none"}
    )

    def lower_passes(self) -> Pipeline:
        """Return the passes that end in float16: of weights, or of everything that it can hold."""
        if self.cpu == "neon":
            return Pipeline.parse("to-fp16,remove-unused")
        return Pipeline([*list(super().lower_passes())[:-1], *Pipeline.parse("half-weights,remove-unused")])

    def stand_in(self) -> str:
        """Return a note where what is for Arm is verified elsewhere."""
        if self.cpu == "neon" and not is_arm():
            return "an x86 processor (same operators, between Casts; not run on Arm here)"
        return ""
