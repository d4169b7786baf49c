"""Factors for channels, moved into the constants before and behind: what the model computes stays."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import qgraph.ir
from qgraph.analysis.channel_sources import NoSourceError, Origin, find_origin
from qgraph.analysis.linear_layers import linear_layers
from qgraph.analysis.scale_folding import Folding, foldings, scale_input
from qgraph.analysis.shapes import shapes_of
from qgraph.pipeline import Context

HEAD = '<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>'


def model_with(body: str, *, inputs: str = "float[b, r, 16] x", seed: int = 0) -> ir.Model:
    """Parse a graph; `@name[16, 8]` in it is a random constant W_name of that shape."""
    rng = np.random.default_rng(seed)
    constants: dict[str, np.ndarray] = {}
    lines = []
    for line in body.strip().splitlines():
        while "@" in line:
            start = line.index("@")
            end = line.index("]", start)
            name, _, shape = f"W_{line[start + 1 : end]}".partition("[")
            sizes = [int(size) for size in shape.split(",") if size]
            constants.setdefault(name, rng.normal(size=sizes).astype(np.float32))
            line = line[:start] + name + line[end + 1 :]
        lines.append(line)
    declared = [f"float[{', '.join(map(str, array.shape))}] {name}" for name, array in constants.items()]
    text = f"{HEAD}\ng ({', '.join([inputs, *declared])}) => (float[b, r, n] y)\n{{\n{chr(10).join(lines)}\n}}"
    model = ir.from_onnx_text(text)
    for name, array in constants.items():
        value = next(one for one in model.graph.inputs if one.name == name)
        value.const_value = ir.tensor(array, name=name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def run(model: ir.Model, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    feeds = {value.name: rng.normal(size=(2, 5, 16)).astype(np.float32) for value in model.graph.inputs}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def scaled(model: ir.Model, seed: int = 5) -> list[Folding]:
    """Scale the input of every layer by random factors and hold the model to its values."""
    exact, rng = run(model), np.random.default_rng(seed)
    found = foldings(model, Context())
    for folding in found:
        scale_input(model, folding, np.exp(rng.normal(size=folding.channels))[folding.tied], suffix="scaled")
    assert qgraph.ir.check(model) is None
    np.testing.assert_allclose(run(model), exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    return found


NORMS = {
    "LayerNormalization": "n = LayerNormalization <axis = -1> (x, @g[16], @c[16])",
    "RMSNormalization": "n = RMSNormalization <axis = -1> (x, @g[16])",
    "SimplifiedLayerNormalization": "n = SimplifiedLayerNormalization <axis = -1, epsilon = 1.0e-5> (x, @g[16])",
    "decomposed": """
        two = Constant <value_float = 2.0> ()
        axes = Constant <value_ints = [-1]> ()
        square = Pow (x, two)
        mean = ReduceMean (square, axes)
        root = Sqrt (mean)
        normal = Div (x, root)
        n = Mul (@g[16], normal)""",
    "decomposed with mean": """
        axes = Constant <value_ints = [-1]> ()
        middle = ReduceMean (x, axes)
        centred = Sub (x, middle)
        square = Mul (centred, centred)
        mean = ReduceMean (square, axes)
        root = Sqrt (mean)
        normal = Div (centred, root)
        weighted = Mul (normal, @g[16])
        n = Add (weighted, @c[16])""",
}
FEEDS = {
    "three readers": "q = MatMul (n, @q[16, 8])\nk = MatMul (n, @k[16, 8])\nt = Add (q, k)\ny = MatMul (t, @o[8, 4])",
    "gemm": """
        flat_shape = Constant <value_ints = [-1, 16]> ()
        flat = Reshape (n, flat_shape)
        h = Gemm <transB = 1> (flat, @q[8, 16], @c1[8])
        active = Relu (h)
        z = Gemm (active, @o[8, 4], @c2[4])
        back = Constant <value_ints = [2, 5, 4]> ()
        y = Reshape (z, back)""",
    "gated": """
        gate = MatMul (n, @gate[16, 24])
        sigmoid = Sigmoid (gate)
        act = Mul (gate, sigmoid)
        up = MatMul (n, @up[16, 24])
        up_b = Add (up, @c3[24])
        both = Mul (act, up_b)
        y = MatMul (both, @down[24, 4])""",
    "split": """
        qk = MatMul (n, @qk[16, 24])
        q, k = Split <axis = -1, num_outputs = 2> (qk)
        act = Tanh (q)
        both = Mul (act, k)
        y = MatMul (both, @down[12, 4])""",
}


@pytest.mark.parametrize(("norm", "feed"), list(itertools.product(NORMS, FEEDS)))
def test_norms_and_layers_before_take_the_factors(norm: str, feed: str):
    model = model_with(f"{NORMS[norm]}\n{FEEDS[feed]}")
    before = len(list(model.graph))
    found = scaled(model)
    mended = [folding.reason for folding in found if folding.origin is None]
    assert mended == []
    assert len(list(model.graph)) == before


ATTENTION = {
    "Attention": "a = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v)",
    "MultiHeadAttention": """
        qs = Slice (q, zero, eight, last)
        a = com.microsoft.MultiHeadAttention <num_heads = 2> (qs, k, v, @bias[24])""",
    "decomposed": """
        split_q = Constant <value_ints = [0, 0, 4, 4]> ()
        split_v = Constant <value_ints = [0, 0, 2, 4]> ()
        q4 = Reshape (q, split_q)
        qt = Transpose <perm = [0, 2, 1, 3]> (q4)
        k4 = Reshape (k, split_v)
        kt = Transpose <perm = [0, 2, 3, 1]> (k4)
        v4 = Reshape (v, split_v)
        vt = Transpose <perm = [0, 2, 1, 3]> (v4)
        two = Constant <value_ints = [2]> ()
        ku = Unsqueeze (kt, two)
        vu = Unsqueeze (vt, two)
        repeated = Constant <value_ints = [1, 1, 2, 1, 1]> ()
        ke = Expand (ku, repeated)
        ve = Expand (vu, repeated)
        k_shape = Constant <value_ints = [0, 4, 4, -1]> ()
        v_shape = Constant <value_ints = [0, 4, -1, 4]> ()
        kk = Reshape (ke, k_shape)
        vv = Reshape (ve, v_shape)
        scores = MatMul (qt, kk)
        p = Softmax <axis = -1> (scores)
        mixed = MatMul (p, vv)
        mt = Transpose <perm = [0, 2, 1, 3]> (mixed)
        join = Constant <value_ints = [0, 0, 16]> ()
        a = Reshape (mt, join)""",
    "side by side": """
        split_q = Constant <value_ints = [0, 0, 4, 4]> ()
        split_v = Constant <value_ints = [0, 0, 2, 4]> ()
        q4 = Reshape (q, split_q)
        qt = Transpose <perm = [0, 2, 1, 3]> (q4)
        gather = Constant <value_ints = [0, 2, -1, 4]> ()
        qg = Reshape (qt, gather)
        k4 = Reshape (k, split_v)
        kt = Transpose <perm = [0, 2, 3, 1]> (k4)
        v4 = Reshape (v, split_v)
        vt = Transpose <perm = [0, 2, 1, 3]> (v4)
        scores = MatMul (qg, kt)
        p = Softmax <axis = -1> (scores)
        mixed = MatMul (p, vt)
        spread = Constant <value_ints = [0, 4, -1, 4]> ()
        ms = Reshape (mixed, spread)
        mt = Transpose <perm = [0, 2, 1, 3]> (ms)
        join = Constant <value_ints = [0, 0, 16]> ()
        a = Reshape (mt, join)""",
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_values_take_the_factors_of_what_attention_gives(kind: str):
    width = 8 if kind == "MultiHeadAttention" else 16
    body = f"""
        zero = Constant <value_ints = [0]> ()
        eight = Constant <value_ints = [8]> ()
        last = Constant <value_ints = [-1]> ()
        q = MatMul (x, @q[16, 16])
        k = MatMul (x, @k[16, 8])
        vw = MatMul (x, @v[16, 8])
        v = Add (vw, @c[8])
        {ATTENTION[kind]}
        y = MatMul (a, @o[{width}, 4])"""
    model = model_with(body)
    found = scaled(model)[-1]
    assert found.origin is not None
    assert {"W_v", "W_c"} <= {str(one.value.name).partition("_scaled")[0] for one in found.origin.sources}
    if kind == "MultiHeadAttention":
        assert len(set(found.tied)) == 8
        return
    # Query heads 0 and 1 read the first values, 2 and 3 the second.
    assert list(found.tied) == [0, 1, 2, 3, 0, 1, 2, 3, 8, 9, 10, 11, 8, 9, 10, 11]
    assert found.origin.heads is not None
    assert np.array_equal(found.origin.heads, np.arange(16).reshape(4, 4))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("h = MatMul (x, @w[16, 8])\ng = Gelu (h)\ny = MatMul (g, @o[8, 4])", "it comes through 'Gelu->g' (Gelu)"),
        (
            "h = MatMul (x, @w[16, 8])\nz = MatMul (h, @o[8, 8])\ny = Add (z, h)",
            "'h' is read by 'Add->y' too",
        ),
        ("y = MatMul (x, @o[16, 4])", "'x' is no result of a node"),
        ("s = Mul (x, x)\ny = MatMul (s, @o[16, 4])", "'x' is read by 'Mul->s' too"),
        (
            "h = MatMul (x, @w[16, 16])\nk = MatMul (h, @w[16, 16])\ny = MatMul (k, @o[16, 4])",
            "the weight of 'MatMul->k' is used elsewhere too",
        ),
    ],
)
def test_where_nothing_takes_them_a_mul_does(body: str, reason: str):
    model = model_with(body)
    muls = sum(node.op_type == "Mul" for node in model.graph)
    found = scaled(model)
    assert reason in [folding.reason for folding in found]
    added = sum(node.op_type == "Mul" for node in model.graph) - muls
    assert added == sum(folding.origin is None for folding in found)


def test_what_leaves_the_model_is_not_scaled():
    model = model_with("h = MatMul (x, @w[16, 8])\ny = MatMul (h, @o[8, 4])")
    hidden = next(node for node in model.graph).outputs[0]
    model.graph.outputs.append(hidden)
    layers, shapes = linear_layers(model).layers, shapes_of(model, Context())
    with pytest.raises(NoSourceError, match="'h' is an output of the model"):
        find_origin(hidden, [layers[1].node], 8, shapes, layers)


def test_cached_values_are_seen_outside():
    body = """
        q = MatMul (x, @q[16, 16])
        k = MatMul (x, @k[16, 16])
        v = MatMul (x, @v[16, 16])
        a, pk, pv = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v)
        y = MatMul (a, @o[16, 4])"""
    model = model_with(body)
    present = next(node for node in model.graph if node.op_type == "Attention").outputs[2]
    assert foldings(model, Context())[-1].origin is not None
    model.graph.outputs.append(present)
    assert "hands its values out" in foldings(model, Context())[-1].reason


def test_scales_are_checked():
    model = model_with("h = MatMul (x, @w[16, 8])\ny = MatMul (h, @o[8, 4])")
    folding = foldings(model, Context())[1]
    with pytest.raises(ValueError, match="positive"):
        scale_input(model, folding, np.zeros(8), suffix="scaled")
    assert isinstance(folding.origin, Origin)


IMAGES = """
    front = Constant <value_ints = [0, 2, 1]> ()
    rows = Transpose <perm = [0, 2, 1]> (x)
    c = Conv (rows, @k[8, 16, 1], @kb[8])
    p = PRelu (c, @slope[8, 1])
    {}
    y = MatMul (back, @o[8, 4])
"""
PLACES = {
    "transposed": "back = Transpose <perm = [0, 2, 1]> (p)",
    "pooled": "q = MaxPool <kernel_shape = [2]> (p)\nback = Transpose <perm = [0, 2, 1]> (q)",
    "normalized": "q = BatchNormalization (p, @g[8], @b[8], @b[8], @v[8])\nback = Transpose <perm = [0, 2, 1]> (q)",
    "reduced": (
        "last = Constant <value_ints = [-1]> ()\nq = ReduceMean <keepdims = 1> (p, last)\n"
        "back = Transpose <perm = [0, 2, 1]> (q)"
    ),
    "clipped at zero": (
        "zero = Constant <value_float = 0.0> ()\nq = Clip (p, zero)\nback = Transpose <perm = [0, 2, 1]> (q)"
    ),
}


@pytest.mark.parametrize("kind", PLACES)
def test_convolutions_take_the_factors(kind: str):
    model = model_with(IMAGES.format(PLACES[kind]))
    for value in model.graph.initializers.values():
        if value.name == "W_v":
            value.const_value = ir.tensor(np.abs(value.const_value.numpy()) + 1, name=value.name)
    folding = scaled(model)[-1]
    assert folding.origin is not None
    names = {str(one.value.name).partition("_scaled")[0] for one in folding.origin.sources}
    assert names == ({"W_g", "W_b"} if kind == "normalized" else {"W_k", "W_kb"})


def test_a_clip_at_six_takes_no_factors():
    body = "zero = Constant <value_float = 0.0> ()\nsix = Constant <value_float = 6.0> ()\nq = Clip (p, zero, six)\n"
    model = model_with(IMAGES.format(body + "back = Transpose <perm = [0, 2, 1]> (q)"))
    assert "clips at 0 and 6" in scaled(model)[-1].reason
