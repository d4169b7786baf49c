"""Linear layers are found from the graph alone, and what is none is told with its reason."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qgraph.analysis.linear_layers import LinearLayers, linear_layers, matches
from qgraph.pipeline import Context

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'


def find(text: str, *, inputs: tuple[str, ...] = (), **weights: np.ndarray) -> LinearLayers:
    """Turn inputs of the graph into initializers and look; those in `inputs` stay inputs as well."""
    model = ir.from_onnx_text(f"{HEAD}\n{text}")
    for value in list(model.graph.inputs):
        if value.name not in weights:
            continue
        value.const_value = ir.tensor(weights[value.name], name=value.name)
        if value.name not in inputs:
            model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return Context().analyse(linear_layers, model)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def reasons(found: LinearLayers) -> dict[str, str]:
    return dict(found.skipped)


def test_matmul_and_gemm_give_the_matrix_with_outputs_first() -> None:
    found = find(
        """g (float[n, 4] x, float[4, 3] w, float[3] b, float[3, 4] t, float[2, 4] c, float[2] d) => (float[n, 2] z)
        {
            [plain] p = MatMul (x, w)
            y = Add (b, p)
            tt = Transpose <perm = [1, 0]> (t)
            [turned] q = MatMul (x, tt)
            [gemm] z = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, c, d)
        }""",
        w=normal(4, 3),
        b=normal(3),
        t=normal(3, 4),
        c=normal(2, 4),
        d=normal(2),
    )
    plain, turned, gemm = found.layers
    assert [(one.name, one.transposed, one.inputs, one.outputs) for one in found.layers] == [
        ("plain", False, 4, 3),
        ("turned", True, 4, 3),
        ("gemm", True, 4, 2),
    ]
    np.testing.assert_array_equal(plain.matrix(), normal(4, 3).T)
    np.testing.assert_array_equal(turned.matrix(), normal(3, 4))
    np.testing.assert_array_equal(gemm.matrix(), normal(2, 4))
    assert plain.matrix().flags.c_contiguous
    assert [one.bias.name if one.bias else None for one in found.layers] == ["b", None, "d"]
    assert {one.x.name for one in found.layers} == {"x"}
    assert not found.skipped


def test_gemm_of_a_transposed_constant_turns_it_twice() -> None:
    found = find(
        """g (float[n, 4] x, float[4, 3] w) => (float[n, 3] y)
        {
            t = Transpose (w)
            y = Gemm <transB = 1> (x, t)
        }""",
        w=normal(4, 3),
    )
    assert not found.layers[0].transposed
    np.testing.assert_array_equal(found.layers[0].matrix(), normal(4, 3).T)


def test_a_tied_embedding_is_one_weight_with_two_layers() -> None:
    found = find(
        """g (int64[n] ids, float[9, 4] table) => (float[n, 9] logits)
        {
            x = Gather (table, ids)
            t = Transpose <perm = [1, 0]> (table)
            logits = MatMul (x, t)
        }""",
        table=normal(9, 4),
    )
    ((weight, layers),) = found.by_weight.items()
    assert weight.name == "table"
    assert [one.kind for one in layers] == ["embedding", "linear"]
    for layer in layers:
        np.testing.assert_array_equal(layer.matrix(), normal(9, 4))
        assert layer.transposed


def test_half_precision_is_read_as_float32() -> None:
    for dtype, name in ((np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")):
        weight = normal(4, 3).astype(dtype)
        found = find(f"g ({name}[n, 4] x, {name}[4, 3] w) => ({name}[n, 3] y) {{ y = MatMul (x, w) }}", w=weight)
        matrix = found.layers[0].matrix()
        assert matrix.dtype == np.float32
        np.testing.assert_array_equal(matrix, weight.T.astype(np.float32))


def test_a_rotary_table_is_no_embedding_but_a_normalised_one_is() -> None:
    found = find(
        """g (int64[n] ids, float[n, 4] q, float[9, 4] cos, float[9, 4] table) => (float[n, 4] y, float[n, 4] z)
        {
            rows = Gather (cos, ids)
            y = Mul (q, rows)
            e = Gather (table, ids)
            squares = Mul (e, e)
            size = ReduceMean (squares)
            z = Mul (e, size)
        }""",
        cos=normal(9, 4),
        table=normal(9, 4),
    )
    assert [one.weight.name for one in found.layers] == ["table"]
    assert "table of factors" in reasons(found)["Gather->rows"]


def test_what_is_no_linear_layer_is_told() -> None:
    found = find(
        """g (float[n, 4] x, float[2, n, 4] deep, float[2, 4, 3] batched, float[3, 4] left, float[4, 3] given,
            float[4, 4] shared, double[n, 4] wide, double[4, 4] double, float[n, 4, 5, 5] image,
            float[2, 4, 1, 1] kernel, float[4] scale, float[4, 4] square) => (float[n, 3] y)
        {
            a = MatMul (deep, batched)
            b = MatMul (left, x)
            c = MatMul (x, given)
            d = MatMul (x, shared)
            dd = Relu (shared)
            e = MatMul (wide, double)
            f = Conv (image, kernel)
            scaled = Mul (shared, scale)
            h = MatMul (x, scaled)
            i = Gemm <transA = 1> (x, square)
            y = MatMul (x, x)
        }""",
        inputs=("given",),
        batched=normal(2, 4, 3),
        left=normal(3, 4),
        given=normal(4, 3),
        shared=normal(4, 4),
        double=normal(4, 4).astype(np.float64),
        kernel=normal(2, 4, 1, 1),
        scale=normal(4),
        square=normal(4, 4),
    )
    assert not found.layers
    told = reasons(found)
    for output, words in {
        "a": "3 dimensions",
        "b": "left factor",
        "c": "a caller may replace",
        "d": "'Relu->dd' too",
        "e": "double",
        "h": "computed by 'Mul->scaled'",
        "i": "transposed",
        "y": "multiplies activations",
    }.items():
        assert words in told[f"{'Gemm' if output == 'i' else 'MatMul'}->{output}"], output
    assert "convolution" in told["Conv->f"]


def test_nodes_inside_subgraphs_and_what_they_share_are_left_alone() -> None:
    found = find(
        """g (bool c, float[n, 4] x, float[4, 4] w, float[4, 4] v) => (float[n, 4] y)
        {
            z = MatMul (x, v)
            y = If (c) <then_branch = t () => (float[n, 4] a) { a = MatMul (z, w) },
                        else_branch = e () => (float[n, 4] b) { b = MatMul (z, v) }>
        }""",
        w=normal(4, 4),
        v=normal(4, 4),
    )
    assert not found.layers
    assert "subgraph" in reasons(found)["MatMul->a"]
    assert "'MatMul->b' too" in reasons(found)["MatMul->z"]


def test_a_compressed_weight_is_left_alone() -> None:
    found = find(
        """g (float[n, 4] x, int8[4, 3] w, float s) => (float[n, 3] y)
        {
            d = DequantizeLinear (w, s)
            y = MatMul (x, d)
        }""",
        w=np.ones((4, 3), np.int8),
        s=np.float32(0.1),
    )
    assert reasons(found) == {"MatMul->y": "its weight is compressed already"}


def test_names_match_patterns_with_their_case() -> None:
    assert matches("layers.0.q_proj", ("*.q_*",))
    assert not matches("layers.0.q_proj", ("*Q*", "q_proj"))
