"""Mutated models: loading, checking and preparing them succeeds or is refused in one line, and never ends otherwise.

The mutants run in a process of their own, so that a crash of native code is a failed test and not the end of all
tests; a mutant that takes too long is named too. Every mutant follows from its number.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

import qgraph.ir
from qgraph.errors import UserError
from qgraph.pipeline import Pipeline

PREPARE = (
    "inline-functions,lift-constants,convert-opset,fold-constants,remove-identity,fold-batch-norm,"
    "deduplicate-initializers,merge-duplicates,remove-unused,infer-shapes,gemm-to-matmul-add,matmul-add-to-gemm"
)
MUTANTS = 3000
SECONDS_EACH = 10

SEEDS = [
    """<ir_version: 8, opset_import: ["" : 11]>
    cnn (float[n,3,8,8] x) => (float[n,10] y)
    <float[4,3,3,3] w, float[4] b, float[10,64] f> {
        c = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w)
        n1 = BatchNormalization (c, b, b, b, b)
        r = Clip (n1)
        p = MaxPool <kernel_shape = [1,1]> (r)
        s = Shape (p)
        i = Constant <value_int = 0> ()
        g = Gather (s, i)
        u = Unsqueeze <axes = [0]> (g)
        m = Constant <value_ints = [-1]> ()
        t = Concat <axis = 0> (u, m)
        q = Reshape (p, t)
        d = Dropout (q)
        e = Gemm <transB = 1> (d, f)
        y = Softmax (e)
    }""",
    """<ir_version: 7, opset_import: ["" : 9]>
    old (float[1,2,4,4] x) => (float[1,2,8,4] y)
    <float[4] s = {1.0,1.0,2.0,2.0}> {
        a = Upsample <mode = "nearest"> (x, s)
        b = Slice <axes = [3], starts = [0], ends = [4]> (a)
        c = Pad <pads = [0,0,0,0,0,0,0,0]> (b)
        d = Transpose <perm = [0,2,1,3]> (c)
        e = Transpose <perm = [0,2,1,3]> (d)
        f = Cast <to = 11> (e)
        y = Cast <to = 1> (f)
    }""",
    """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
    flow (float[n,4] x, int64 k, bool c) => (float[n,4] y, float[m,n,4] z) {
        h = Abs (x)
        l, z = Loop (k, c, x) <body = b (int64 i, bool e, float[n,4] a) => (bool e2, float[n,4] a2, float[n,4] o) {
            e2 = Identity (e)
            a2 = Add (a, h)
            o = Identity (a2)
        }>
        t = Constant <value_int = 1> ()
        v = Cast <to = 9> (t)
        w = If (v) <then_branch = p () => (float[n,4] r) { r = my.twice (h) },
                    else_branch = q () => (float[n,4] r) { r = Neg (l) }>
        y = Add (w, l)
    }
    <domain: "my", opset_import: ["" : 18]> twice (a) => (b) { b = Add (a, a) }""",
    """<ir_version: 10, opset_import: ["" : 21]>
    attention (float[n,s,8] x) => (float[n,s,8] y)
    <float[8,8] w, float[8] b> {
        q = MatMul (x, w)
        a = Add (q, b)
        s0 = Shape <start = 0, end = 2> (a)
        h = Constant <value_ints = [2, 4]> ()
        t = Concat <axis = 0> (s0, h)
        r = Reshape (a, t)
        k = Transpose <perm = [0,2,1,3]> (r)
        kt = Transpose <perm = [0,1,3,2]> (k)
        m = MatMul (k, kt)
        o = Softmax (m)
        v = MatMul (o, k)
        vt = Transpose <perm = [0,2,1,3]> (v)
        z = Constant <value_ints = [0, 0, 8]> ()
        y = Reshape (vt, z)
    }""",
]  # fmt: skip


def seeds() -> list[onnx.ModelProto]:
    models = [parser.parse_model(text) for text in SEEDS]
    generator = np.random.default_rng(0)
    for model in models:
        for tensor in model.graph.initializer:
            if not tensor.float_data:
                array = generator.normal(size=tuple(tensor.dims)).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return models


# --- mutations -------------------------------------------------------------------------------------------------------


def flip_bytes(data: bytearray, source: random.Random) -> None:
    for _ in range(source.randint(1, 6)):
        data[source.randrange(len(data))] = source.randrange(256)


def cut_out(data: bytearray, source: random.Random) -> None:
    start = source.randrange(len(data))
    del data[start : start + source.randint(1, 40)]


def copy_in(data: bytearray, source: random.Random) -> None:
    start, place = source.randrange(len(data)), source.randrange(len(data))
    data[place:place] = data[start : start + source.randint(1, 40)]


BYTES: list[Callable[[bytearray, random.Random], None]] = [flip_bytes, flip_bytes, cut_out, copy_in]


def every_node(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    for node in nodes:
        nodes.extend(inner for attribute in node.attribute for inner in attribute.g.node)
    return nodes


def names(model: onnx.ModelProto) -> list[str]:
    found = [name for node in every_node(model) for name in (*node.input, *node.output)]
    return [*found, "nowhere", "", *(tensor.name for tensor in model.graph.initializer)]


def rewire(model: onnx.ModelProto, source: random.Random) -> None:
    node = source.choice(every_node(model))
    if node.input:
        node.input[source.randrange(len(node.input))] = source.choice(names(model))


def rename_output(model: onnx.ModelProto, source: random.Random) -> None:
    node = source.choice(every_node(model))
    if node.output:
        node.output[source.randrange(len(node.output))] = source.choice(names(model))


def change_operator(model: onnx.ModelProto, source: random.Random) -> None:
    node = source.choice(every_node(model))
    node.op_type = source.choice([other.op_type for other in every_node(model)] + OPERATORS)


OPERATORS = [
    *["Upsample", "Resize", "Scan", "Loop", "If", "Split", "TopK", "Squeeze", "ReduceSum", "ReduceMean", "LSTM"],
    *["Tile", "MaxUnpool", "STFT", "Attention"],
    *["ConstantOfShape", "Range", "Expand", "Einsum", "OneHot", "DepthToSpace", "ConvTranspose", "Scatter", "GatherND"],
    *["NoSuchOperator", "SequenceConstruct", "Optional", "NonZero", "Where", "Col2Im", "DFT", "GridSample"],
    *["RoiAlign", "LpPool", "CenterCropPad", "Unique", "Compress", "StringSplit", "DeformConv"],
]  # fmt: skip


def change_attribute(model: onnx.ModelProto, source: random.Random) -> None:
    node = source.choice(every_node(model))
    name = source.choice([*(a.name for a in node.attribute), "axis", "axes", "perm", "to", "group", "strides", "body"])
    values = [0, -1, 7, 1 << 40, -(1 << 63), [0], [-1, 5], [], [1 << 62] * 3, "text", 0.5, [0.0, 1e30], [1, 2, 3, 4]]
    for attribute in list(node.attribute):
        if attribute.name == name:
            node.attribute.remove(attribute)
    value = source.choice(values)
    if value != []:
        node.attribute.append(helper.make_attribute(name, value))


def drop_attribute(model: onnx.ModelProto, source: random.Random) -> None:
    node = source.choice(every_node(model))
    if node.attribute:
        node.attribute.pop(source.randrange(len(node.attribute)))


def change_inputs(model: onnx.ModelProto, source: random.Random) -> None:
    node = source.choice(every_node(model))
    if node.input and source.random() < 0.5:
        node.input.pop()
    else:
        node.input.extend([source.choice(names(model))] * source.randint(1, 4))


def change_outputs(model: onnx.ModelProto, source: random.Random) -> None:
    node = source.choice(every_node(model))
    if node.output and source.random() < 0.5:
        node.output.pop()
    else:
        node.output.extend(f"extra{index}" for index in range(source.randint(1, 4)))


def change_tensor(model: onnx.ModelProto, source: random.Random) -> None:
    tensors = [
        *model.graph.initializer,
        *(a.t for node in every_node(model) for a in node.attribute if a.HasField("t")),
    ]
    if tensors:
        tensor = source.choice(tensors)
        if source.random() < 0.5 and tensor.dims:
            sizes = [0, -1, 1 << 33, 1 << 62, 3]
            tensor.dims[source.randrange(len(tensor.dims))] = source.choice(sizes)
        else:
            tensor.data_type = source.choice([0, 1, 7, 8, 10, 14, 16, 22, 99])


def change_declared(model: onnx.ModelProto, source: random.Random) -> None:
    value = source.choice([*model.graph.input, *model.graph.output])
    tensor = value.type.tensor_type
    if source.random() < 0.3:
        tensor.elem_type = source.choice([0, 1, 7, 9, 10, 99])
    elif tensor.shape.dim:
        sizes = [0, -5, 1 << 62, 1]
        tensor.shape.dim[source.randrange(len(tensor.shape.dim))].dim_value = source.choice(sizes)


def change_opset(model: onnx.ModelProto, source: random.Random) -> None:
    opset = source.choice(list(model.opset_import))
    opset.version = source.choice([0, 1, 6, 7, 8, 9, 10, 12, 13, 17, 18, 20, 21, 23, 99, -3])


def drop_or_repeat_node(model: onnx.ModelProto, source: random.Random) -> None:
    index = source.randrange(len(model.graph.node))
    if source.random() < 0.5:
        model.graph.node.pop(index)
    else:
        model.graph.node.insert(source.randrange(len(model.graph.node)), model.graph.node[index])


STRUCTURE: list[Callable[[onnx.ModelProto, random.Random], None]] = [
    rewire, rename_output, change_operator, change_attribute, drop_attribute, change_inputs, change_outputs,
    change_tensor, change_declared, change_opset, drop_or_repeat_node,
]  # fmt: skip


def mutant(number: int, models: list[onnx.ModelProto]) -> bytes:
    """Return mutant `number`: two of three are changed in their structure, the others in their bytes."""
    source = random.Random(number)
    model = onnx.ModelProto()
    model.CopyFrom(models[number % len(models)])
    if number % 3:
        for _ in range(source.choice([1, 1, 2, 3])):
            source.choice(STRUCTURE)(model, source)
        return model.SerializeToString()
    data = bytearray(model.SerializeToString())
    source.choice(BYTES)(data, source)
    return bytes(data)


# --- running them ----------------------------------------------------------------------------------------------------


def outcome(path: Path) -> str:
    """Load, check, prepare and save a model; return what it came to, or what should not have happened."""
    try:
        model = qgraph.ir.load(path)
        Pipeline.parse(PREPARE).run(model)
        qgraph.ir.save(model, path.with_suffix(".out"))
    except UserError as error:
        return "refused" if "\n" not in str(error) else f"more than one line: {error}"
    except Exception:  # noqa: BLE001 - whatever else it is, it is the finding
        return traceback.format_exc()
    return "prepared"


def too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"longer than {SECONDS_EACH} s")


def main(first: int, last: int) -> None:
    """Run mutants and print number and outcome of each; a number without outcome is one that crashed."""
    models = seeds()
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.onnx"
        for number in range(first, last):
            path.write_bytes(mutant(number, models))
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()
            signal.alarm(SECONDS_EACH)
            sys.stdout.write(f"= {outcome(path)!r}\n")
            signal.alarm(0)


def outcomes(first: int, last: int) -> Iterator[tuple[int, str]]:
    """Yield number and outcome of mutants; start again after one that ends the process."""
    while first < last:
        command = [sys.executable, __file__, str(first), str(last)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        for index, line in enumerate(lines):
            if not line.startswith("="):
                first = int(line) + 1
                crashed = index + 1 == len(lines)
                yield int(line), f"the process ended with {done.returncode}: {done.stderr[-2000:]}" if crashed else ""
            else:
                yield first - 1, line[2:]
        if not lines:
            raise RuntimeError(done.stderr)


def test_mutants_are_refused_or_prepared():
    found = [(number, text) for number, text in outcomes(0, MUTANTS) if text]
    bad = [(number, text) for number, text in found if text not in ("'refused'", "'prepared'")]
    assert bad == []
    prepared = sum(text == "'prepared'" for _, text in found)
    assert len(found) == MUTANTS
    assert prepared > MUTANTS // 40, "nearly all are refused at once: the mutations are too coarse to test anything"


def one_node(text: str, opset: int = 17) -> onnx.ModelProto:
    graph = f"g (float[2,4] x) => (float[a,b] y) {{ {text} }}"
    return parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {graph}')


def of_other_type() -> onnx.ModelProto:
    model = one_node("y = Transpose(x)")
    model.graph.node[0].attribute.append(helper.make_attribute("perm", 7))
    return model


def of_opset(version: int) -> onnx.ModelProto:
    model = one_node("y = Abs(x)")
    model.opset_import[0].version = version
    return model


REGRESSIONS: dict[str, Callable[[], bytes]] = {
    "attribute missing": lambda: one_node("y = Upsample(x)", 7).SerializeToString(),
    "attribute of another type": lambda: of_other_type().SerializeToString(),
    "attribute unknown": lambda: one_node("c = Constant<value_in = 7>() y = Add(x, c)").SerializeToString(),
    "constant without value": lambda: one_node("c = Constant() y = Add(x, c)").SerializeToString(),
    "text that is no text": lambda: one_node("y = Abs(x)").SerializeToString().replace(b"Abs", b"A\x89s"),
    "text attribute that is no text": lambda: (
        one_node('y = Upsample<mode = "near", scales = [1.0, 2.0]>(x)', 8)
        .SerializeToString()
        .replace(b"near", b"n\xdcar")
    ),
    "input missing": lambda: one_node("y = Mul(x)").SerializeToString(),
    "axes out of range": lambda: one_node("t = Transpose<perm = [5, 9]>(x) y = Transpose(t)").SerializeToString(),
    "type undefined": lambda: one_node("c = Cast<to = 0>(x) y = Neg(c)").SerializeToString(),
    "size beyond 64 bits": lambda: one_node(
        "y = Slice<axes = [0], starts = [-9223372036854775808], ends = [9223372036854775807]>(x)", 9
    ).SerializeToString(),
    "opset beyond 32 bits": lambda: of_opset(1 << 40).SerializeToString(),
    "opset below zero": lambda: of_opset(-3).SerializeToString(),
}
"""What failed once."""


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_failed_once(tmp_path: Path, name: str):
    (tmp_path / "m.onnx").write_bytes(REGRESSIONS[name]())
    assert outcome(tmp_path / "m.onnx") in ("refused", "prepared")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
