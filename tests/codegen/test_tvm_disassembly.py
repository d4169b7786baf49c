"""Float instructions in machine code are found, and integer graphs compile to none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qgraph.codegen import tvm_disassembly, tvm_library

pytest.importorskip("tvm", reason="Apache TVM is not installed")

sys.path.insert(0, str(Path(__file__).parent))

from tvm_build import PRODUCTS, called, function_inputs, layer, parsed

needs_objdump = pytest.mark.skipif(not tvm_disassembly.can_disassemble(), reason="objdump is not installed")


@needs_objdump
def test_the_code_of_integer_graphs_has_no_float_instructions(tmp_path: Path):
    models = [
        layer(),
        parsed(PRODUCTS),
        *(called(name, function_inputs(name)) for name in ("Softmax", "LayerNormalize")),
    ]
    for model in models:
        tvm_library.emit_so(model, tmp_path)
        assert tvm_disassembly.float_instructions(tmp_path / "model.so") == []


@needs_objdump
def test_float_instructions_are_found_where_there_are_some(tmp_path: Path):
    import tvm
    from tvm import relax

    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((64,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(builder.emit(relax.op.multiply(x, relax.op.add(x, relax.const(1.5)))))
        builder.emit_func_output(y)
    tvm.compile(builder.finalize(), target="llvm").export_library(str(tmp_path / "model.so"))
    found = tvm_disassembly.float_instructions(tmp_path / "model.so")
    assert {one.function.startswith(("fused_add", "add", "multiply")) for one in found} == {True}
    assert any("mul" in one.mnemonic for one in found)


def test_machine_code_is_told_apart():
    def found(*instructions: str, kind: str = "elf64-x86-64") -> list[str]:
        lines = [f"model.so:     file format {kind}", "0000000000001000 <layer_compute_>:"]
        lines += [f"    1000:\t{one}" for one in instructions]
        return [one.mnemonic for one in tvm_disassembly.scan(lines)]

    floats = [
        "addss  %xmm0,%xmm1",
        "vfmadd213ps (%rax),%ymm1,%ymm2",
        "cvtdq2ps %xmm0,%xmm0",
        "vcvttps2dq %zmm0,%zmm1",
        "divsd  %xmm0,%xmm1",
        "fld1",
        "vcmpltps %ymm0,%ymm1,%ymm2",
        "ucomiss %xmm0,%xmm1",
        "vdpbf16ps %zmm0,%zmm1,%zmm2",
    ]
    assert found(*floats) == [one.split()[0] for one in floats]
    integers = [
        "movaps %xmm0,%xmm1",
        "vmovups (%rax),%zmm0",
        "xorps  %xmm0,%xmm0",
        "vpaddd %ymm0,%ymm1,%ymm2",
        "imul   %rax,%rbx",
        "vpdpbusd %zmm0,%zmm1,%zmm2",
        "vblendvps %ymm0,%ymm1,%ymm2,%ymm3",
        "vpermilps $0x1,%ymm0,%ymm0",
        "shufps $0x1,%xmm0,%xmm1",
        "vbroadcastss (%rax),%ymm0",
        "call   1000 <other_compute_>",
        "add    $0x1,%eax",
        "sub    $0x1,%eax",
        "cmp    %eax,%ebx",
        "div    %rcx",
        "mul    %rcx",
        "vunpcklps %xmm0,%xmm1,%xmm2",
        "vinsertf128 $1,%xmm0,%ymm1,%ymm2",
        "maxps",
    ]
    assert found(*integers) == ["maxps"]
    assert found("call   1f00 <__truncsfhf2>") == ["call"]
    assert found(
        "fadd\ts0, s1, s2", "scvtf\ts0, w1", "fmov\tw0, s0", "add\tw0, w1, w2", kind="elf64-littleaarch64"
    ) == ["fadd", "scvtf"]
