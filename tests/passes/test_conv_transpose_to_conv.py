"""`conv-transpose-to-conv` against ONNX Runtime's ConvTranspose, over many attributes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.pipeline import Pipeline
from qgraph.runtime.session import open_session

FLOAT = onnx.TensorProto.FLOAT


def transposed(
    sizes: list[int],
    kernel: list[int],
    channels: tuple[int, int] = (4, 6),
    *,
    with_bias: bool = True,
    **attributes: Any,
) -> ir.Model:
    random = np.random.default_rng(1)
    inputs, outputs = channels
    weight = random.normal(size=(inputs, outputs // attributes.get("group", 1), *kernel)).astype(np.float32)
    constants = {"w": weight, **({"b": random.normal(size=outputs).astype(np.float32)} if with_bias else {})}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("ConvTranspose", ["x", *constants], ["y"], **attributes)],
        "g",
        [onnx.helper.make_tensor_value_info("x", FLOAT, ["n", inputs, *sizes])],
        [onnx.helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def assert_kept(model: ir.Model) -> None:
    (x,) = model.graph.inputs
    feeds = {"x": np.random.default_rng(2).normal(size=[2, *list(x.shape)[1:]]).astype(np.float32)}

    def run() -> np.ndarray:
        return open_session(ir.to_proto(model).SerializeToString(), optimise=False, threads=1).run(None, feeds)[0]

    before = run()
    assert Pipeline.parse("conv-transpose-to-conv").run(model).changed == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert "ConvTranspose" not in {node.op_type for node in model.graph}
    after = run()
    assert before.shape == after.shape
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6 * np.abs(before).max())
    assert Pipeline.parse("conv-transpose-to-conv").run(model).changed == 0


@pytest.mark.parametrize("seed", range(60))
def test_random_attributes(seed: int):
    random = np.random.default_rng(seed)
    rank = seed % 3 + 1

    def numbers(low: int, high: int) -> list[int]:
        return [int(number) for number in random.integers(low, high, rank)]

    strides, dilations, kernel = numbers(1, 4), numbers(1, 3), numbers(1, 5)
    reach = [(size - 1) * dilation for size, dilation in zip(kernel, dilations, strict=True)]
    pads = [int(random.integers(0, one + 1)) for one in reach] + [int(random.integers(0, one + 1)) for one in reach]
    extra = [int(random.integers(0, stride)) for stride in strides]
    model = transposed(
        numbers(7, 9),
        kernel,
        with_bias=bool(seed % 2),
        group=int(random.choice([1, 2])),
        strides=strides,
        dilations=dilations,
        pads=pads,
        output_padding=extra,
    )
    assert_kept(model)


@pytest.mark.parametrize("mode", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("output", [None, [9, 7], [8, 8], [10, 9]])
@pytest.mark.parametrize("kernel", [[3, 2], [4, 5], [1, 1]])
def test_sizes_that_are_asked_for(mode: str, output: list[int] | None, kernel: list[int]):
    if output is not None and kernel == [1, 1]:
        output = [7, 7]  # the only one that ONNX Runtime takes
    given = {} if output is None else {"output_shape": output}
    assert_kept(transposed([4, 4], kernel, strides=[2, 2], auto_pad=mode, **given))


def test_more_is_cut_off_than_the_kernel_reaches():
    model = transposed([6], [2], strides=[3], pads=[4, 2])
    assert_kept(model)
    assert "Slice" in {node.op_type for node in model.graph}


def test_valid_and_depthwise():
    assert_kept(transposed([4, 5], [3, 3], auto_pad="VALID", strides=[1, 2]))
    assert_kept(transposed([4, 5], [3, 3], (4, 4), group=4, strides=[2, 2]))


def test_a_computed_weight_stays():
    model = transposed([4], [2])
    model.graph.inputs.append(model.graph.initializers["w"])
    report = Pipeline.parse("conv-transpose-to-conv").run(model)
    assert [one.reason for one in report.parts[0].skipped] == ["ConvTranspose stays: its weight is computed"]
