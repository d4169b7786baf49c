"""Equalization: values kept through every kind of graph, ranges used better, and what must stay as it is."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from golden_rewrites import as_written

import qgraph.ir
from qgraph.errors import UserError
from qgraph.pipeline import Context, Pipeline, Report

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
FILES = sorted((Path(__file__).parent.parent / "golden" / "equalize").glob("*.onnxtxt"))


def model_with(body: str, *, inputs: str = "float[2, 3, 8, 8] x", seed: int = 0) -> ir.Model:
    """Parse a graph; `@name[8, 3, 1, 1]` in it is a random constant W_name, whose channels differ much in range."""
    rng = np.random.default_rng(seed)
    constants: dict[str, np.ndarray] = {}
    lines = []
    for line in body.strip().splitlines():
        while "@" in line:
            start = line.index("@")
            end = line.index("]", start)
            name, _, shape = f"W_{line[start + 1 : end]}".partition("[")
            sizes = [int(size) for size in shape.split(",")]
            if name not in constants:
                spread = np.exp(rng.normal(size=[sizes[0], *[1] * (len(sizes) - 1)]))
                constants[name] = (rng.normal(size=sizes) * spread).astype(np.float32)
            line = line[:start] + name + line[end + 1 :]
        lines.append(line)
    declared = [f"float[{', '.join(map(str, array.shape))}] {name}" for name, array in constants.items()]
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    text = f"{head}\ng ({', '.join([inputs, *declared])}) => (float[N, M, H, W] y)\n{{\n{chr(10).join(lines)}\n}}"
    model = ir.from_onnx_text(text)
    for name, array in constants.items():
        value = next(one for one in model.graph.inputs if one.name == name)
        value.const_value = ir.tensor(array, name=name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def feeds(count: int = 4, seed: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(2, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def run(model: ir.Model, samples: list[dict[str, np.ndarray]] | None = None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in samples or feeds()])


def equalize(model: ir.Model, options: str = "", *, calibrated: bool = False) -> Report:
    context = Context(calibration=feeds() if calibrated else None, threads=1)
    return Pipeline.parse(f"equalize{options}").run(model, context=context).parts[0]


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    """Return the weight of each layer by its result."""
    layers = [node for node in model.graph if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    return {node.outputs[0].name: np.asarray(qgraph.ir.constant(node.inputs[1]), np.float64) for node in layers}


def decibels(weight: np.ndarray, axis: int) -> float:
    """Return the signal-to-noise ratio of a tensor in 8 bits with one scale, of its output channels on average."""
    step = np.abs(weight).max() / 127
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    noise = np.square(rows - np.round(rows / step) * step).sum(axis=1)
    return float(np.mean(10 * np.log10(np.square(rows).sum(axis=1) / np.maximum(noise, 1e-12))))


DEPTHWISE = """
    a = Conv (x, @a[8, 3, 1, 1], @ab[8])
    ar = Relu (a)
    d = Conv <group = 8, pads = [1, 1, 1, 1]> (ar, @d[8, 1, 3, 3], @db[8])
    dr = Relu (d)
    y = Conv (dr, @y[4, 8, 1, 1], @yb[4])
"""
GRAPHS = {
    "depthwise": DEPTHWISE,
    "grouped": """
        a = Conv (x, @a[8, 3, 1, 1])
        g = Conv <group = 2> (a, @g[6, 4, 3, 3], @gb[6])
        y = Conv <group = 3> (g, @y[3, 2, 1, 1])""",
    "residual": """
        a = Conv (x, @a[8, 3, 1, 1], @ab[8])
        ar = Relu (a)
        b = Conv <pads = [1, 1, 1, 1]> (ar, @b[8, 8, 3, 3], @bb[8])
        s = Add (ar, b)
        sr = Relu (s)
        c = Conv (sr, @c[8, 8, 1, 1])
        t = Add (sr, c)
        y = Conv (t, @y[4, 8, 1, 1])""",
    "concat": """
        a = Conv (x, @a[6, 3, 1, 1], @ab[6])
        b = Conv (x, @b[2, 3, 1, 1])
        ar = Relu (a)
        c = Concat <axis = 1> (b, ar)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
        z = Conv (ar, @z[4, 6, 1, 1])
        zp = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (z)
        k = Conv (p, @k[4, 8, 1, 1])
        both = Concat <axis = 1> (k, zp)
        y = Conv (both, @y[4, 8, 1, 1])""",
    "shuffle": """
        apart = Constant <value_ints = [0, 2, 4, 8, 8]> ()
        together = Constant <value_ints = [0, 8, 8, 8]> ()
        a = Conv (x, @a[8, 3, 1, 1], @ab[8])
        ar = Relu (a)
        five = Reshape (ar, apart)
        turned = Transpose <perm = [0, 2, 1, 3, 4]> (five)
        flat = Reshape (turned, together)
        one, two = Split <axis = 1, num_outputs = 2> (flat)
        b = Conv <group = 4> (one, @b[4, 1, 1, 1])
        joined = Concat <axis = 1> (two, b)
        y = Conv (joined, @y[4, 8, 1, 1])""",
    "picked": """
        shape = Constant <value_ints = [8, 2, 64]> ()
        halves = Constant <value_ints = [2, 2, 4, 8, 8]> ()
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        a = Conv (x, @a[8, 3, 1, 1], @ab[8])
        pairs = Reshape (a, shape)
        turned = Transpose <perm = [1, 0, 2]> (pairs)
        split = Reshape (turned, halves)
        first = Gather (split, zero)
        second = Gather (split, one)
        b = Conv (first, @b[4, 4, 1, 1])
        c = Conv (second, @c[4, 4, 1, 1])
        t = Add (b, c)
        y = Conv (t, @y[4, 4, 1, 1])""",
    "prelu": """
        a = Conv (x, @a[8, 3, 1, 1], @ab[8])
        p = PRelu (a, @slope[8, 1, 1])
        b = Conv (p, @b[8, 8, 1, 1])
        l = LeakyRelu <alpha = 0.1> (b)
        y = Conv (l, @y[4, 8, 1, 1])""",
    "pad and slice": """
        pads = Constant <value_ints = [0, 2, 1, 1, 0, 2, 1, 1]> ()
        start = Constant <value_ints = [1]> ()
        end = Constant <value_ints = [9]> ()
        axis = Constant <value_ints = [1]> ()
        a = Conv (x, @a[6, 3, 1, 1], @ab[6])
        padded = Pad (a, pads)
        part = Slice (padded, start, end, axis)
        y = Conv (part, @y[4, 8, 3, 3])""",
    "flatten": """
        a = Conv (x, @a[8, 3, 8, 8], @ab[8])
        ar = Relu (a)
        f = Flatten (ar)
        g = Gemm <transB = 1> (f, @g[8, 8], @gb[8])
        gr = Relu (g)
        m = MatMul (gr, @m[8, 8])
        four = Constant <value_ints = [0, 8, 1, 1]> ()
        back = Reshape (m, four)
        y = Conv (back, @y[4, 8, 1, 1])""",
    "flatten places": """
        a = Conv (x, @a[8, 3, 4, 4], @ab[8])
        f = Flatten (a)
        g = Gemm (f, @g[200, 8], @gb[8])
        four = Constant <value_ints = [0, 8, 1, 1]> ()
        back = Reshape (g, four)
        y = Conv (back, @y[4, 8, 1, 1])""",
    "transposed": """
        a = Conv (x, @a[8, 3, 1, 1], @ab[8])
        t = ConvTranspose <group = 2> (a, @t[8, 3, 2, 2], @tb[6])
        u = ConvTranspose (t, @u[6, 8, 2, 2], @ub[8])
        y = Conv (u, @y[4, 8, 1, 1])""",
    "gate": """
        a = Conv (x, @a[8, 3, 1, 1], @ab[8])
        ar = Relu (a)
        m = GlobalAveragePool (ar)
        s = Conv (m, @s[4, 8, 1, 1])
        sr = Relu (s)
        e = Conv (sr, @e[8, 4, 1, 1])
        w = Sigmoid (e)
        g = Mul (w, ar)
        y = Conv (g, @y[4, 8, 1, 1])""",
    "batch norm": """
        a = Conv (x, @a[8, 3, 1, 1])
        n = BatchNormalization (a, @scale[8], @shift[8], @shift[8], @one[8])
        r = Relu (n)
        y = Conv (r, @y[4, 8, 1, 1])""",
    "vectors": """
        a = Conv (x, @a[8, 3, 1, 1])
        b = Add (a, @v[8, 1, 1])
        m = Mul (b, @w[8, 1, 1])
        y = Conv (m, @y[4, 8, 1, 1])""",
}


def positive_variance(model: ir.Model) -> None:
    for value in model.graph.initializers.values():
        if value.name == "W_one":
            value.const_value = ir.tensor(np.abs(value.const_value.numpy()) + 1, name=value.name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path):
    _, report = as_written(path, equalize)
    assert (report.changed > 0) == (not path.stem.startswith("not-"))


@pytest.mark.parametrize("method", ["range", "noise"])
@pytest.mark.parametrize("name", GRAPHS)
def test_values_stay_and_a_second_run_changes_nothing(name: str, method: str):
    model = model_with(GRAPHS[name], seed=len(name))
    positive_variance(model)
    exact, before = run(model), weights(model)
    report = equalize(model, f"{{method={method}}}", calibrated=True)
    assert report.changed > 0
    assert qgraph.ir.check(model) is None
    np.testing.assert_allclose(run(model), exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    assert any(not np.array_equal(before[name], after) for name, after in weights(model).items())
    assert equalize(model, f"{{method={method}}}", calibrated=True).changed == 0


@pytest.mark.parametrize("name", ["depthwise", "residual", "concat", "shuffle", "prelu"])
def test_ranges_are_used_better(name: str):
    model = model_with(GRAPHS[name], seed=4)
    before = weights(model)
    equalize(model)
    after = weights(model)
    gains = [decibels(after[one], 0) - decibels(before[one], 0) for one in after]
    assert np.mean(gains) > 1.0
    assert min(gains) > -1.5


def test_all_ties_of_a_group_take_one_factor():
    """What a residual Add adds, and all that reads it, changes by the same factor."""
    model = model_with(GRAPHS["residual"], seed=6)
    before = weights(model)
    equalize(model)
    after = weights(model)
    made = (before["a"] / after["a"])[:, 0, 0, 0]
    np.testing.assert_allclose((before["b"] / after["b"])[:, 0, 0, 0] * made[0], made, rtol=1e-4)
    np.testing.assert_allclose((after["y"] / before["y"])[0, :, 0, 0], made, rtol=1e-4)


KEPT = {
    "shared weights": (
        "a = Conv (x, @a[3, 3, 1, 1])\nb = Conv (a, @a[3, 3, 1, 1])\ny = Conv (b, @y[4, 3, 1, 1])",
        "the weight of 'Conv->a' (Conv) is used elsewhere too",
    ),
    "another function": (
        "a = Conv (x, @a[8, 3, 1, 1])\nt = Tanh (a)\ny = Conv (t, @y[4, 8, 1, 1])",
        "'a' is read by 'Tanh->t' (Tanh)",
    ),
    "hard swish": (
        "a = Conv (x, @a[8, 3, 1, 1])\nh = HardSwish (a)\ny = Conv (h, @y[4, 8, 1, 1])",
        "'a' is read by 'HardSwish->h' (HardSwish)",
    ),
    "hard swish in parts": (
        "a = Conv (x, @a[8, 3, 1, 1])\ng = HardSigmoid (a)\nh = Mul (a, g)\ny = Conv (h, @y[4, 8, 1, 1])",
        "'a' is read by 'HardSigmoid->g' (HardSigmoid)",
    ),
    "a square": (
        "a = Conv (x, @a[8, 3, 1, 1])\nh = Mul (a, a)\ny = Conv (h, @y[4, 8, 1, 1])",
        "'a' is read by 'Mul->h' (Mul)",
    ),
    "one number": (
        (
            "two = Constant <value_float = 2.0> ()\na = Conv (x, @a[8, 3, 1, 1])\nh = Add (a, two)\n"
            "y = Conv (h, @y[4, 8, 1, 1])"
        ),
        "'a' is read by 'Add->h' (Add)",
    ),
    "rounded": (
        "a = Conv (x, @a[8, 3, 1, 1])\ni = Cast <to = 7> (a)\nh = Cast <to = 1> (i)\ny = Conv (h, @y[4, 8, 1, 1])",
        "'a' is read by 'Cast->i' (Cast)",
    ),
    "clipped": (
        (
            "low = Constant <value_float = 0.0> ()\nsix = Constant <value_float = 6.0> ()\n"
            "a = Conv (x, @a[8, 3, 1, 1])\nh = Clip (a, low, six)\ny = Conv (h, @y[4, 8, 1, 1])"
        ),
        "'a' is read by 'Clip->h' (Clip)",
    ),
    "padded with ones": (
        (
            "one = Constant <value_float = 1.0> ()\npads = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> ()\n"
            "a = Conv (x, @a[8, 3, 1, 1])\nh = Pad (a, pads, one)\ny = Conv (h, @y[4, 8, 1, 1])"
        ),
        "'a' is read by 'Pad->h' (Pad)",
    ),
    "an output": ("y = Conv (x, @y[8, 3, 1, 1])\nz = Conv (y, @z[4, 8, 1, 1])", "'y' is an output of the model"),
    "a subgraph": (
        (
            "a = Conv (x, @a[8, 3, 1, 1])\n"
            "yes = Constant <value = bool[1] {1}> ()\n"
            "i = If (yes) <then_branch = g1 () => (float[2, 8, 8, 8] p) { p = Abs (a) }, "
            "else_branch = g2 () => (float[2, 8, 8, 8] q) { q = Neg (a) }>\n"
            "b = Conv (a, @b[8, 8, 1, 1])\nt = Add (b, i)\ny = Conv (t, @y[4, 8, 1, 1])"
        ),
        "'a' is read by 'Abs->p' inside a subgraph",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_stays_is_told_with_the_reason(name: str):
    body, reason = KEPT[name]
    model = model_with(body)
    before, operators = weights(model), [node.op_type for node in model.graph]
    report = equalize(model)
    assert report.changed == 0
    assert reason in [one.reason for one in report.skipped]
    assert [node.op_type for node in model.graph] == operators
    assert all(np.array_equal(before[one], after) for one, after in weights(model).items())


def clipped(bound: float) -> ir.Model:
    body = DEPTHWISE.replace("= Relu (a)", "= Clip (a, low, six)").replace("= Relu (d)", "= Clip (d, low, six)")
    numbers = f"low = Constant <value_float = 0.0> ()\nsix = Constant <value_float = {bound}> ()\n"
    return model_with(numbers + body, seed=11)


def reached(model: ir.Model) -> dict[str, np.ndarray]:
    """Return the largest number of each channel before each Clip."""
    copy = model.clone()
    values = [node.inputs[0] for node in copy.graph if node.op_type == "Clip"]
    found = {}
    for value in values:
        copy.graph.outputs.clear()
        copy.graph.outputs.append(value)
        found[value.name] = run(copy).max(axis=(0, 2, 3))
    return found


def test_a_clip_that_nothing_reaches_becomes_relu():
    model = clipped(1000.0)
    exact = run(model)
    report = equalize(model, calibrated=True)
    assert "2 Clip as Relu" in report.notes
    assert not [node for node in model.graph if node.op_type == "Clip"]
    np.testing.assert_allclose(run(model), exact, rtol=0, atol=1e-4 * np.abs(exact).max())


def test_factors_go_through_a_clip_that_some_channels_reach():
    model = clipped(6.0)
    exact, before, largest = run(model), weights(model), reached(model)
    assert all(0 < (one > 6).sum() < 8 for one in largest.values())
    report = equalize(model, calibrated=True)
    assert report.changed == 3
    assert sum(node.op_type == "Clip" for node in model.graph) == 2
    np.testing.assert_allclose(run(model), exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    # Channels that are clipped keep their factor: what reads them does not change.
    factors = (weights(model)["y"] / before["y"])[0, :, 0, 0]
    assert (factors[largest["d"] > 6] == 1.0).all()
    assert (factors[largest["d"] <= 6] != 1.0).any()
    assert equalize(model, calibrated=True).changed == 0


def test_clips_as_they_are_wished():
    model = clipped(6.0)
    assert "2 Clip as Relu" in equalize(model, "{relu6=always}").notes
    model = clipped(1000.0)
    assert equalize(model, "{relu6=never}", calibrated=True).changed == 3
    assert sum(node.op_type == "Clip" for node in model.graph) == 2


def high(reader: str = "y = Conv (r, @y[4, 8, 1, 1])") -> ir.Model:
    """Return a model whose channels 0 and 1 are above zero on all samples."""
    model = model_with(f"a = Conv (x, @a[8, 3, 1, 1], @ab[8])\nr = Relu (a)\n{reader}", seed=13)
    bias = model.graph.initializers["W_ab"].const_value.numpy().copy()
    bias[:2] = 100.0
    model.graph.initializers["W_ab"].const_value = ir.tensor(bias, name="W_ab")
    return model


HIGH = {
    "no bias": "y = Conv (r, @y[4, 8, 1, 1])",
    "kernels": "y = Conv <group = 4> (r, @y[4, 2, 3, 3], @yb[4])",
    "two": "b = Conv (r, @b[4, 8, 1, 1])\nc = Conv (r, @c[4, 8, 1, 1], @cb[4])\ny = Add (b, c)",
}


@pytest.mark.parametrize("name", HIGH)
def test_high_biases_go_through_the_relu(name: str):
    model = high(HIGH[name])
    exact = run(model)
    report = equalize(model, calibrated=True)
    assert "1 layers without their high bias" in report.notes
    assert qgraph.ir.check(model) is None
    np.testing.assert_allclose(run(model), exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    copy = model.clone()
    relu = next(node for node in copy.graph if node.op_type == "Relu")
    copy.graph.outputs.clear()
    copy.graph.outputs.append(relu.inputs[0])
    least, largest = run(copy).min(axis=(0, 2, 3)), run(copy).max(axis=(0, 2, 3))
    np.testing.assert_allclose(least[:2] / largest[:2], 0.1 / 1.1, atol=1e-3)  # a tenth of the span is left below
    assert equalize(model, calibrated=True).changed == 0


def test_high_biases_move_from_weights_in_constant_nodes_and_leave_room_below():
    model = high()
    seen = run(model)
    weight = model.graph.initializers["W_a"]
    node = ir.node("Constant", [], {"value": weight.const_value})
    node.outputs[0].name, node.outputs[0].dtype = "w", ir.DataType.FLOAT
    model.graph.insert_before(model.graph[0], node)
    weight.replace_all_uses_with(node.outputs[0])
    model.graph.initializers.pop("W_a")
    assert "1 layers without their high bias" in equalize(model, "{relu6=never}", calibrated=True).notes
    np.testing.assert_allclose(run(model), seen, rtol=0, atol=1e-4 * np.abs(seen).max())
    further = [{"x": feed["x"] * np.float32(1.1)} for feed in feeds()]  # lower than any sample
    np.testing.assert_allclose(run(model, further), run(high(), further), rtol=0, atol=1e-4 * np.abs(seen).max())


def test_high_biases_stay_where_few_numbers_were_seen():
    body = "p = GlobalAveragePool (x)\na = Conv (p, @a[8, 3, 1, 1], @ab[8])\nr = Relu (a)\ny = Conv (r, @y[4, 8, 1, 1])"
    for count, absorbed in ((15, False), (16, True)):  # of two images each
        model = model_with(body)
        model.graph.initializers["W_ab"].const_value = ir.tensor(np.full(8, 100.0, np.float32), name="W_ab")
        report = Pipeline.parse("equalize").run(model, context=Context(calibration=feeds(count), threads=1)).parts[0]
        assert ("1 layers without their high bias" in report.notes) is absorbed
        assert (
            any("show 30 numbers of a channel, fewer than 32" in one.reason for one in report.skipped) is not absorbed
        )


def test_what_float32_leaves_of_a_constant_counts_little():
    body = (
        "a = Conv (x, @a[8, 3, 1, 1])\nb = Relu (a)\nc = Conv (b, @c[4, 8, 1, 1])\ny = Conv (c, @y[4, 4, 1, 1], @d[4])"
    )
    noise = []
    for size in (0.0, 1e-9):
        model = model_with(body)
        weight = model.graph.initializers["W_y"].const_value.numpy() * np.float32(size)
        model.graph.initializers["W_y"].const_value = ir.tensor(weight, name="W_y")
        noise.append(equalize(model, "{method=noise}", calibrated=True).figures["noise"][0])
    np.testing.assert_allclose(*noise, rtol=1e-3)


@pytest.mark.parametrize(
    ("reader", "reason"),
    [
        ("y = Conv <pads = [1, 1, 1, 1]> (r, @y[4, 8, 3, 3])", "'Conv->y' pads it with zeros"),
        (
            "p = MaxPool <kernel_shape = [2, 2]> (r)\ny = Conv (p, @y[4, 8, 1, 1])",
            "'MaxPool->p' (MaxPool) reads it too",
        ),
    ],
)
def test_high_biases_stay_where_a_border_would_count_otherwise(reader: str, reason: str):
    model = high(reader)
    exact = run(model)
    report = equalize(model, calibrated=True)
    assert f"its high bias stays: {reason}" in [one.reason for one in report.skipped]
    np.testing.assert_allclose(run(model), exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    assert not [one for one in equalize(high(), "{absorb=false}", calibrated=True).notes if "high bias" in one]


def test_bad_input():
    with pytest.raises(UserError, match="needs calibration data"):
        equalize(model_with(DEPTHWISE), "{method=noise}")
    with pytest.raises(UserError, match="bits is a width"):
        equalize(model_with(DEPTHWISE), "{bits=1}")
    model = model_with(DEPTHWISE)
    broken = model.graph.initializers["W_d"].const_value.numpy().copy()
    broken[0] = np.nan
    model.graph.initializers["W_d"].const_value = ir.tensor(broken, name="W_d")
    with pytest.raises(UserError, match="'Conv->d' holds NaN"):
        equalize(model)


def test_dead_and_tiny_channels_stay_finite():
    model = model_with(DEPTHWISE)
    weight = model.graph.initializers["W_a"].const_value.numpy().copy()
    weight[0], weight[1] = 0.0, 1e-30
    model.graph.initializers["W_a"].const_value = ir.tensor(weight, name="W_a")
    exact = run(model)
    equalize(model, calibrated=True)
    assert all(np.isfinite(one).all() for one in weights(model).values())
    np.testing.assert_allclose(run(model), exact, rtol=0, atol=1e-4 * np.abs(exact).max())


def test_mobilenet_with_one_scale_for_a_tensor(assets: Path, monkeypatch: pytest.MonkeyPatch):
    """Per tensor, MobileNetV2 collapses; equalized, it does not. Of 30 images the score is a rough one."""
    del assets
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import data

    task = data.TASKS["mobilenet_v2"]
    samples = list(task.calibration())[::5]
    evaluated = [feed for _, feed in zip(range(30), task.evaluation(), strict=False)]
    scores = {}
    for passes in ("qdq{per_channel=false}", "equalize,qdq{per_channel=false}"):
        model = qgraph.ir.load(task.model())
        prepare = "lift-constants,convert-opset{version=21},fold-constants,remove-identity,fold-batch-norm"
        Pipeline.parse(f"{prepare},{passes}").run(model, context=Context(calibration=samples, threads=1))
        scores[passes] = task.score(run(model, evaluated))
    assert scores["qdq{per_channel=false}"] < 30
    assert scores["equalize,qdq{per_channel=false}"] > 50


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_reduction_over_no_axes_lets_everything_through(keepdims: int):
    model = model_with(
        f"""
        c = Conv <pads = [1, 1, 1, 1]> (x, @a[6, 3, 3, 3])
        r = Relu (c)
        s = ReduceSum <keepdims = {keepdims}, noop_with_empty_axes = 1> (r)
        y = Conv (s, @b[4, 6, 1, 1])
        """
    )
    exact = run(model)

    assert equalize(model).changed == 2
    np.testing.assert_allclose(run(model), exact, rtol=1e-4, atol=1e-5)
