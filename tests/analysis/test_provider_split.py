"""Which provider runs what, and the copies between them, by the tables of the CUDA and TensorRT providers."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest

from qgraph.analysis.provider_split import CPU, Split, split_by_provider
from qgraph.capabilities import table

CUDA, TENSORRT = table("onnxruntime-cuda"), table("tensorrt")


def model(opset: int, body: str, signature: str = "float[1,8,8,8] x) => (float y") -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> g ({signature}) {{ {body} }}'
    return ir.from_onnx_text(text)


def counts(split: Split) -> dict[str, dict[str, int]]:
    """Return provider -> operator -> number of nodes."""
    found: dict[str, Counter[str]] = {}
    for node, provider in split.providers.items():
        found.setdefault(provider, Counter())[node.op_type] += 1
    return {provider: dict(operators) for provider, operators in found.items()}


def test_a_node_without_a_kernel_costs_a_copy_each_way():
    body = "a = Relu(x)  p = Det(a)  y = Relu(p)"

    split = split_by_provider(model(18, body), [CUDA])

    assert counts(split) == {CPU: {"Det": 1}, "CUDAExecutionProvider": {"Relu": 2}}
    assert (split.copies, split.parts) == (2, 3)
    assert [one.reason for one in split.left] == ["ONNX Runtime's CUDAExecutionProvider has no Det"]


@pytest.mark.parametrize(
    ("opset", "op", "on_gpu"),
    [
        (18, "MaxPool <kernel_shape = [2,2]> (x)", True),
        (21, "MaxPool <kernel_shape = [2,2]> (x)", True),
        (22, "MaxPool <kernel_shape = [2,2]> (x)", False),
        (18, "Pad (x, x)", True),
        (19, "Pad (x, x)", True),
        (22, "Conv (x, x)", True),
        (21, "Softplus (x)", True),
        (22, "Softplus (x)", True),
        (22, "Elu (x)", False),
        (23, "Attention (x, x, x)", True),
        (22, "GlobalAveragePool (x)", True),
    ],
)
def test_a_higher_opset_can_lose_kernels(opset: int, op: str, *, on_gpu: bool):
    split = split_by_provider(model(opset, f"y = {op}"), [CUDA])

    assert set(split.providers.values()) == {"CUDAExecutionProvider" if on_gpu else CPU}


def test_shapes_are_computed_on_the_host_and_cost_no_copies():
    body = """s = Shape(x)  i = Constant<value_int = 0>()  n = Gather(s, i)  a = Constant<value_ints = [0]>()
              m = Unsqueeze(n, a)  y = Reshape(x, m)"""

    split = split_by_provider(model(18, body, "float[n,8] x) => (float y"), [CUDA])

    assert {node.op_type: provider for node, provider in split.providers.items()}["Reshape"] == CUDA.provider
    assert split.copies == 0


def test_a_shape_that_depends_on_numbers_is_copied():
    body = "z = NonZero(x)  s = Shape(z)  y = Cast<to = 1>(s)"

    split = split_by_provider(model(18, body, "float[8,8] x) => (float[2] y"), [CUDA])

    assert counts(split)[CUDA.provider] == {"Cast": 1, "NonZero": 1}
    assert split.copies == 1  # the shape goes to the GPU; Shape looks at no element of what NonZero made there


def test_tensorrt_leaves_to_cuda_what_it_lacks_without_a_copy():
    body = "a = Relu(x)  g = com.microsoft.QuickGelu(a)  y = Relu(g)"

    split = split_by_provider(model(18, body), [TENSORRT, CUDA])

    assert counts(split) == {"CUDAExecutionProvider": {"QuickGelu": 1}, "TensorrtExecutionProvider": {"Relu": 2}}
    assert (split.copies, split.parts) == (0, 3)
    assert len(split.left) == 1


def test_an_axes_input_must_be_constant_for_tensorrt():
    computed = model(18, "y = ReduceMean(x, a)", "float[8,8] x, int64[1] a) => (float y")
    constant = model(18, "a = Constant<value_ints = [1]>()  y = ReduceMean(x, a)", "float[8,8] x) => (float y")

    assert counts(split_by_provider(computed, [TENSORRT])) == {CPU: {"ReduceMean": 1}}
    assert counts(split_by_provider(constant, [TENSORRT])) == {"TensorrtExecutionProvider": {"ReduceMean": 1}}


def test_shapes_are_tensorrts_own_where_it_comes_first():
    body = "s = Shape(x)  t = Cast<to = 1>(s)  y = Relu(t)"

    split = split_by_provider(model(18, body, "float[n,8] x) => (float[2] y"), [TENSORRT, CUDA])

    assert counts(split) == {"TensorrtExecutionProvider": {"Cast": 1, "Relu": 1, "Shape": 1}}
    assert split.copies == 0


@pytest.mark.parametrize(
    ("body", "signature", "reason"),
    [
        (
            "q, s, z = DynamicQuantizeLinear(x)  y = Relu(x)",
            "float[8,8] x) => (float y",
            "has no DynamicQuantizeLinear",
        ),
        ("y = MatMulInteger(x, w)", "uint8[8,8] x, int8[8,8] w) => (int32 y", "input 0 is uint8"),
        ("y = ConvInteger(x, w)", "int8[1,8,8,8] x, int8[8,8,1,1] w) => (int32 y", "has no ConvInteger"),
        (
            "y = com.microsoft.DynamicQuantizeMatMul(x, w, s)",
            "float[8,8] x, int8[8,8] w, float s) => (float y",
            "has no",
        ),
    ],
)
def test_why_cuda_int8_stores_weights_only(body: str, signature: str, reason: str):
    """A product in integers would need its input quantized by an operator that the GPU has not."""
    split = split_by_provider(model(21, body, signature), [CUDA])

    assert any(reason in one.reason for one in split.left)
