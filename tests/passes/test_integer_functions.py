"""The bodies of the integer functions in ONNX Runtime against their definitions: the same integers everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.analysis.integer_functions import DOMAIN, FUNCTIONS
from qgraph.analysis.shapes import Shapes
from qgraph.numerics import integer_math
from qgraph.numerics.requantize import ROUNDINGS, requantize
from qgraph.passes import InlineFunctions
from qgraph.passes._integer_functions import call
from qgraph.pipeline import Pipeline
from qgraph.runtime.session import open_session

INT32 = np.iinfo(np.int32)
Arrays = Sequence[np.ndarray]


def inputs_like(arrays: Arrays) -> list[ir.Value]:
    return [
        ir.Value(
            name=f"input{index}",
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape([f"n{index}_{axis}" for axis in range(array.ndim)]),
        )
        for index, array in enumerate(arrays)
    ]


def model_of(arrays: Arrays, *calls: tuple[str, str | None]) -> ir.Model:
    """Return a model that calls functions, each with its rounding, on inputs like `arrays`."""
    inputs = inputs_like(arrays)
    model = ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": 21}, name="main"), ir_version=8)
    for index, (name, rounding) in enumerate(calls):
        node = call(model, name, inputs, rounding)
        node.outputs[0].name = f"output{index}"
        if node.outputs[0].shape is None:
            node.outputs[0].shape = ir.Shape([None] * max(array.ndim for array in arrays))
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
    return model


class Runner:
    """A model in ONNX Runtime, checked before."""

    def __init__(self, model: ir.Model) -> None:
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        self._session = open_session(proto.SerializeToString(), threads=1)

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        return self._session.run(None, {f"input{index}": array for index, array in enumerate(arrays)})


def check(name: str, definition: Callable[..., np.ndarray], cases: Sequence[Arrays]) -> None:
    runner = Runner(model_of(cases[0], (name, None)))
    for arrays in cases:
        expected, (found,) = definition(*arrays), runner(*arrays)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def spread(random: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Return int64 of every size up to `bits` bits and of both signs, the limits among them."""
    limit = 1 << bits
    numbers = random.integers(-limit, limit, shape, endpoint=True) >> random.integers(0, bits, shape)
    edges = [-limit, 1 - limit, -1, 0, 1, limit - 1, limit]
    numbers.reshape(-1)[: len(edges)] = edges
    return numbers


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32])
@pytest.mark.parametrize("channels", [(), (63,), (63, 1, 1)])
def test_requantize(dtype: type[np.integer], channels: tuple[int, ...]):
    random, limits = np.random.default_rng(len(channels)), np.iinfo(dtype)
    shifts = np.arange(63).reshape(1, *channels) if channels else np.arange(63)
    scalars = [np.array(value, dtype) for value in (3, limits.min + 2, limits.max - 1)]
    x = np.clip(spread(random, (2, 63, 3, 5) if len(channels) == 3 else (4, 63), 31), INT32.min, INT32.max)
    runner = None
    for shift in shifts:
        for multiplier in (0, 1 << 30, 3 << 29, INT32.max, None):
            drawn = random.integers(1 << 30, 1 << 31, channels) if multiplier is None else np.full(channels, multiplier)
            arrays = [np.asarray(array, np.int32) for array in (x, drawn, shift)] + scalars
            runner = runner or Runner(model_of(arrays, *(("Requantize", rounding) for rounding in ROUNDINGS)))
            for rounding, found in zip(ROUNDINGS, runner(*arrays), strict=True):
                assert found.dtype == dtype
                np.testing.assert_array_equal(found, requantize(*arrays, rounding), err_msg=f"{rounding} {shift}")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_requantize_many_random_numbers(rounding: str):
    random, count = np.random.default_rng(0), 300_000
    x = np.clip(spread(random, (count,), 31), INT32.min, INT32.max)
    multiplier = random.integers(1 << 30, 1 << 31, count) >> (zeros := random.integers(0, 31, count)) << zeros
    shift = random.integers(0, 63, count)
    limits = [np.array(value, np.int32) for value in (0, INT32.min, INT32.max)]
    arrays = [*(array.astype(np.int32) for array in (x, multiplier, shift)), *limits]
    (found,) = Runner(model_of(arrays, ("Requantize", rounding)))(*arrays)
    np.testing.assert_array_equal(found, requantize(*arrays, rounding))


def test_integer_sqrt():
    random = np.random.default_rng(0)
    roots = np.concatenate([np.arange(5000), random.integers(0, 1 << 31, 50_000), 2 ** np.arange(31), [(1 << 31) - 1]])
    near = np.concatenate([roots * roots - 1, roots * roots, roots * roots + 1, roots * (roots + 1), [1 << 62]])
    cases = [np.maximum(near, 0), np.abs(spread(random, (30_000,), 62))]
    check("IntegerSqrt", integer_math.integer_sqrt, [[case] for case in cases])


def test_rounded_divide():
    random = np.random.default_rng(0)
    small = np.arange(-50, 51)
    cases = [
        (small.reshape(-1, 1), small.reshape(1, -1)),
        (spread(random, (1000, 50), 61), spread(random, (1000, 50), 61)),
        (spread(random, (1000, 50), 61), spread(random, (1, 50), 20)),
    ]
    check("RoundedDivide", integer_math.rounded_divide, cases)


def test_table_interpolate():
    random = np.random.default_rng(0)
    x = np.arange(-(1 << 15), 1 << 15).astype(np.int16)
    tables = [np.where(np.arange(513) % 2, 1 << 22, -(1 << 22)), random.integers(-(1 << 22), 1 << 22, 513)]
    check("TableInterpolate", integer_math.table_interpolate, [(x, table.astype(np.int32)) for table in tables])


@pytest.mark.parametrize("last", [1, 64])
def test_softmax(last: int):
    random = np.random.default_rng(last)
    table = np.rint((1 << 15) * np.exp(-np.arange(last + 1) * 8 / last)).astype(np.int32)
    cases = []
    for divisor in (1, 10, 4096, INT32.max):
        for bits in (4, 14, 31):
            x = np.clip(spread(random, (6, 5, 11), bits), INT32.min, INT32.max).astype(np.int32)
            x[0, 0] = 7
            cases.append((x, table, *(np.array(value, np.int32) for value in (divisor, 1 << 15))))
    check("Softmax", integer_math.softmax, cases)


@pytest.mark.parametrize(
    ("name", "definition"),
    [("LayerNormalize", integer_math.layer_normalize), ("RMSNormalize", integer_math.rms_normalize)],
)
def test_normalization(name: str, definition: Callable[..., np.ndarray]):
    random = np.random.default_rng(0)
    cases = []
    for fraction in (1, 64, 4096):
        for bits in (3, 8, 15):
            x = np.concatenate([spread(random, (7, 3, 24), bits), np.full((1, 3, 24), 9), np.zeros((1, 3, 24), int)])
            parameters = (fraction, random.integers(0, 1 << 20), 1 << 14)
            cases.append((x.astype(np.int32), *(np.array(value, np.int64) for value in parameters)))
    check(name, definition, cases)


EXAMPLES = {
    "IntegerSqrt": [np.arange(9)],
    "RoundedDivide": [np.arange(-4, 5), np.array(3)],
    "TableInterpolate": [np.arange(9, dtype=np.int16), np.arange(513, dtype=np.int32)],
    "Softmax": [np.arange(9, dtype=np.int32), np.array([1 << 15, 9, 0], np.int32), np.int32([4])[0], np.int32([99])[0]],
    "LayerNormalize": [np.arange(9, dtype=np.int32), *(np.array(value) for value in (8, 3, 100))],
    "RMSNormalize": [np.arange(9, dtype=np.int32), *(np.array(value) for value in (8, 3, 100))],
    "Requantize": [
        *(np.array(value, np.int32) for value in ([-3, 5, 7], 1 << 30, 31)),
        *(np.array(value, np.int8) for value in (1, -128, 127)),
    ],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_calls_can_be_inlined(name: str):
    arrays = [np.asarray(array) for array in EXAMPLES[name]]
    roundings = list(ROUNDINGS) if name == "Requantize" else [None]
    model = model_of(arrays, *((name, rounding) for rounding in roundings))
    expected = Runner(model)(*arrays)
    Pipeline([InlineFunctions()]).run(model)
    assert not model.functions
    assert all(node.domain == "" for node in qgraph.ir.walk(model))
    for found, before in zip(Runner(model)(*arrays), expected, strict=True):
        np.testing.assert_array_equal(found, before)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shapes_are_inferred(name: str):
    arrays = [np.asarray(array) for array in EXAMPLES[name]]
    model = model_of(arrays, (name, "half-up" if name == "Requantize" else None))
    (y,), (x, *_) = model.graph.outputs, model.graph.inputs
    y.dtype, dtype = None, y.dtype
    shapes = Shapes(model).run()
    assert (shapes.dtype(y), shapes.dims(y)) == (dtype, shapes.dims(x))


def test_bodies_hold_no_float():
    for name in FUNCTIONS:
        arrays = [np.asarray(array) for array in EXAMPLES[name]]
        model = model_of(arrays, *((name, rounding) for rounding in (ROUNDINGS if name == "Requantize" else [None])))
        Pipeline([InlineFunctions()]).run(model)
        inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True, data_prop=True)
        typed = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
        assert {output for node in inferred.graph.node for output in node.output} <= {
            *typed,
            *(value.name for value in inferred.graph.output),
        }
        integers = {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT64, ir.DataType.BOOL}
        assert {ir.DataType(number) for number in typed.values()} <= integers | {ir.DataType.INT8, ir.DataType.INT16}


def test_a_function_is_added_once_with_what_it_calls():
    arrays = EXAMPLES["LayerNormalize"]
    model = model_of(arrays, ("LayerNormalize", None), ("RMSNormalize", None), ("LayerNormalize", None))
    names = [name for _, name, _ in model.functions]
    assert names == ["LayerNormalize", "RoundedDivide", "IntegerSqrt", "RMSNormalize"]
    assert model.graph.opset_imports == {"": 21, DOMAIN: 1}
    assert model.ir_version == 10
    outputs = [(value.dtype, value.shape) for value in model.graph.outputs]
    assert outputs == [(ir.DataType.INT32, model.graph.inputs[0].shape)] * 3


def test_a_call_in_a_branch(tmp_path):
    x, flag = np.arange(-4, 5), np.array(True)
    inputs = inputs_like([flag, x])
    model = ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": 21}, name="main"), ir_version=10)
    scalars = [qgraph.ir.initializer(model.graph, "k", np.array(value, np.int32)) for value in (1 << 30, 31, 0)]
    cast = ir.node("Cast", [inputs[1]], {"to": ir.DataType.INT32})
    branches = []
    for rounding in ("half-up", "gemmlowp"):
        node = call(model, "Requantize", [cast.outputs[0], *scalars[:2], scalars[2], *[scalars[2]] * 2], rounding)
        node.outputs[0].name = rounding
        branches.append(ir.Graph([], node.outputs, nodes=[node], name=rounding))
    choice = ir.node("If", [inputs[0]], {"then_branch": branches[0], "else_branch": branches[1]})
    choice.outputs[0].name, choice.outputs[0].dtype = "y", ir.DataType.INT32
    choice.outputs[0].shape = inputs[1].shape
    model.graph.extend([cast, choice])
    model.graph.outputs.append(choice.outputs[0])
    qgraph.ir.save(model, tmp_path / "model.onnx")
    assert qgraph.ir.check(qgraph.ir.load(tmp_path / "model.onnx")) is None
    assert Runner(model)(flag, x)[0].tolist() == [0] * 9


@pytest.mark.parametrize(
    ("name", "rounding", "message"),
    [
        ("Softsign", None, "no integer function 'Softsign'"),
        ("Softmax", "half-up", "rounding of Softmax is 'half-up'"),
        ("Requantize", None, "rounding of Requantize is None"),
        ("Requantize", "half-odd", "rounding of Requantize is 'half-odd'"),
    ],
)
def test_what_cannot_be_called(name: str, rounding: str | None, message: str):
    with pytest.raises(ValueError, match=message):
        model_of(EXAMPLES["Requantize"], (name, rounding))
