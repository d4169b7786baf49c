"""What ONNX Runtime makes of several nodes on the CPU: a small model for each form, and the kernels found in it.

A form is a pattern and conditions, in words. `found_fusions` opens each form's model, looks at the graph that the
runtime really runs, and says which kernel stands in the place of the pattern. Sizes are chosen so that no kernel
depends on the processor: six channels have no blocked form.

Whether a kernel computes in integers is told from its result: products of activations that were rounded to 8 bits
differ from the exact ones by more than 1e-4.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_arithmetic import block_form, nbits_form
from qgraph.capabilities import Fusion, operator_name
from qgraph.runtime.session import open_session

__all__ = ["FORMS", "Form", "found_fusions"]

SOURCE = "probe"
_MICROSOFT = "com.microsoft"
_OPSET = 21
_TWO_BIT_OPSET = 25
_IR_VERSION = 11
_SEED = 0
_ROUNDED = 1e-4
"""Relative error from which a product is taken to be one of rounded activations."""
_ROWS, _WIDTH, _COLUMNS = 4, 512, 32
_SCALE = 0.02
_PLUMBING = frozenset({
    "Cast", "DequantizeLinear", "QuantizeLinear", "Transpose", "com.microsoft.DequantizeLinear",
    "com.microsoft.QuantizeLinear",
})  # fmt: skip
_WEIGHTS: Mapping[int, np.dtype] = {
    2: np.dtype(ml_dtypes.int2),
    4: np.dtype(ml_dtypes.int4),
    8: np.dtype(np.int8),
}
_INTEGERS: Mapping[str, np.dtype] = {name: np.dtype(name) for name in ("int8", "uint8", "int16", "uint16")}


@dataclasses.dataclass(frozen=True)
class Form:
    """Several nodes, in words and as a model.

    Attributes:
        pattern: the nodes.
        when: what else holds.
        build: makes the model.
        measured: whether to tell from the result if it is computed in integers.
    """

    pattern: str
    when: tuple[str, ...]
    build: Callable[[], ir.Model] = dataclasses.field(repr=False, compare=False)
    measured: bool = False


def found_fusions(forms: Sequence[Form] | None = None) -> Iterator[Fusion]:
    """Yield what the installed runtime makes of each form.

    Raises:
        UserError: ONNX Runtime is not installed, or refuses a model.
    """
    for form in FORMS if forms is None else forms:
        model = form.build()
        written = _operators(model)
        with tempfile.TemporaryDirectory(prefix="qgraph-") as scratch:
            source, optimised = Path(scratch) / "model.onnx", Path(scratch) / "optimised.onnx"
            qgraph.ir.save(model, source)
            open_session(source, optimised_path=optimised)
            result = qgraph.ir.load(optimised)
            kernels = [name for name in _operators(result) if name not in written]
            arithmetic = _arithmetic(source) if form.measured else _moved(form, result)
        yield Fusion(form.pattern, form.when, " + ".join(kernels), SOURCE, arithmetic)


def _operators(model: ir.Model) -> list[str]:
    names = {operator_name(node.domain, node.op_type) for node in qgraph.ir.walk(model)}
    return sorted(names - _PLUMBING)


def _moved(form: Form, result: ir.Model) -> str:
    """Tell, where one layer stays between the two, whether it reads integers or what was made float again."""
    layer = re.fullmatch(r"DequantizeLinear -> (\w+) -> QuantizeLinear", form.pattern)
    node = next((one for one in result.graph if layer is not None and qgraph.ir.is_op(one, layer[1])), None)
    value = None if node is None else node.inputs[0]
    maker = None if value is None else value.producer()
    if maker is None:
        return ""
    return "float" if maker.op_type == "DequantizeLinear" else "integers"


def _arithmetic(path: Path) -> str:
    """Tell whether a product is one of rounded activations: it is not linear in them."""
    session = open_session(path)
    random = np.random.default_rng(_SEED)
    one, other = (random.standard_normal(session.get_inputs()[0].shape).astype(np.float32) for _ in range(2))
    of_one, of_other, of_both = (
        np.asarray(session.run(None, {"x": feed})[0], np.float64) for feed in (one, other, one + other)
    )
    error = np.abs(of_both - of_one - of_other).max() / np.abs(of_both).max()
    return "integers" if error > _ROUNDED else "float"


class _Net:
    """A graph from `x` to `y` that is written node by node."""

    def __init__(self, shape: Sequence[int], opset: int = _OPSET) -> None:
        self.x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        self._random = np.random.default_rng(_SEED)
        self._opset = opset
        self._nodes: list[ir.Node] = []
        self._constants: list[ir.Value] = []

    def constant(self, array: np.ndarray) -> ir.Value:
        name = f"c{len(self._constants)}"
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self._constants.append(value)
        return value

    def scale(self, *shape: int) -> ir.Value:
        return self.constant(np.full(shape, _SCALE, np.float32))

    def floats(self, *shape: int) -> ir.Value:
        return self.constant(self._random.standard_normal(shape).astype(np.float32))

    def integers(self, dtype: np.dtype, *shape: int) -> ir.Value:
        low = 1 if dtype.name.startswith("u") else -2
        return self.constant(self._random.integers(low, 2, shape).astype(dtype))

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, domain=domain, name=f"n{len(self._nodes)}")
        node.outputs[0].name = f"v{len(self._nodes)}"
        self._nodes.append(node)
        return node.outputs[0]

    def dynamic(self, value: ir.Value) -> Sequence[ir.Value]:
        node = ir.node("DynamicQuantizeLinear", [value], num_outputs=3, name=f"n{len(self._nodes)}")
        for index, output in enumerate(node.outputs):
            output.name = f"v{len(self._nodes)}_{index}"
        self._nodes.append(node)
        return node.outputs

    def quantized(self, value: ir.Value, dtype: np.dtype, zero: int) -> ir.Value:
        """Quantize and dequantize."""
        scale, point = self.scale(), self.constant(np.array(zero, dtype))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", value, scale, point), scale, point)

    def weight(self, dtype: np.dtype, *shape: int) -> ir.Value:
        return self.op(
            "DequantizeLinear", self.integers(dtype, *shape), self.scale(), self.constant(np.zeros((), dtype))
        )

    def model(self, result: ir.Value) -> ir.Model:
        result.name, result.type = "y", ir.TensorType(ir.DataType.FLOAT)
        imports = {"": self._opset, _MICROSOFT: 1}
        graph = ir.Graph(
            [self.x], [result], nodes=self._nodes, initializers=self._constants, opset_imports=imports, name="form"
        )
        return ir.Model(graph, ir_version=_IR_VERSION)


def _block_product(op_type: str, bits: int, block: int, *, trans: bool = False, transpose: bool = False) -> ir.Model:
    """A product with a weight in blocks along its inner axis; `trans` of a Gemm, `transpose` by a node."""
    net = _Net((_ROWS, _WIDTH), _TWO_BIT_OPSET if bits == 2 else _OPSET)
    axis = 1 if trans or transpose else 0
    shape = (_COLUMNS, _WIDTH) if axis else (_WIDTH, _COLUMNS)
    scales = (_COLUMNS, _WIDTH // block) if axis else (_WIDTH // block, _COLUMNS)
    weight = net.op(
        "DequantizeLinear", net.integers(_WEIGHTS[bits], *shape), net.scale(*scales), axis=axis, block_size=block
    )
    attributes: Mapping[str, Any] = {"transB": 1} if trans else {}
    if transpose:
        weight = net.op("Transpose", weight, perm=[1, 0])
    return net.model(net.op(op_type, net.x, weight, **attributes))


def _looked_up() -> ir.Model:
    """A table in blocks whose rows are looked up."""
    net = _Net((_ROWS,))
    table = net.op(
        "DequantizeLinear",
        net.integers(_WEIGHTS[4], _COLUMNS, _WIDTH),
        net.scale(_COLUMNS, _WIDTH // 32),
        axis=1,
        block_size=32,
    )
    return net.model(net.op("Gather", table, net.op("Cast", net.x, to=ir.DataType.INT64.value)))


def _nbits(bits: int, block: int, level: int) -> ir.Model:
    """A MatMulNBits as it is stored."""
    net = _Net((_ROWS, _WIDTH))
    packed = net.integers(np.dtype(np.uint8), _COLUMNS, _WIDTH // block, block * bits // 8)
    scales = net.scale(_COLUMNS * (_WIDTH // block))
    attributes: Mapping[str, Any] = {
        "K": _WIDTH,
        "N": _COLUMNS,
        "bits": bits,
        "block_size": block,
        "accuracy_level": level,
    }
    return net.model(net.op("MatMulNBits", net.x, packed, scales, domain=_MICROSOFT, **attributes))


_IMAGE = (1, 6, 8, 8)


def _quantized_layer(
    op_type: str, activations: str, weights: str = "", *, out: bool = True, **attributes: Any
) -> ir.Model:
    """A layer between QuantizeLinear and DequantizeLinear; with a weight, one that is quantized too."""
    flat = op_type in ("MatMul", "Gemm")
    net = _Net((_ROWS, _COLUMNS) if flat else _IMAGE)
    dtype = _INTEGERS[activations]
    zero = 0 if activations.startswith("int") else 1 << dtype.itemsize * 8 - 1
    inputs: list[ir.Value | None] = [net.quantized(net.x, dtype, zero)]
    if weights:
        inputs.append(net.weight(_INTEGERS[weights], *((_COLUMNS, _COLUMNS) if flat else (6, 6, 3, 3))))
    elif op_type in ("Add", "Mul", "Sub", "Div", "Concat", "Where"):
        inputs.append(net.quantized(net.op("Exp", net.x), dtype, zero))
    if op_type == "Clip":
        inputs += [net.constant(np.array(bound, np.float32)) for bound in (-0.5, 0.5)]
    if op_type == "Where":
        inputs.insert(0, net.constant(np.ones((1, 1, 1, 8), dtype=bool)))
    if op_type == "Resize":
        inputs += [None, net.constant(np.array([1, 1, 2, 2], np.float32))]
    if op_type == "LayerNormalization":
        inputs.append(net.floats(8))
    result = net.op(op_type, *inputs, **attributes)
    return net.model(net.quantized(result, dtype, zero) if out else result)


def _clamped(op_type: str, activations: str) -> ir.Model:
    """A quantized convolution with Relu before its result is quantized at zero point 0."""
    net = _Net(_IMAGE)
    dtype = _INTEGERS[activations]
    taken = net.quantized(net.x, dtype, 0)
    result = net.op(op_type, net.op("Conv", taken, net.weight(_INTEGERS["int8"], 6, 6, 3, 3)))
    return net.model(net.quantized(result, dtype, 0))


def _dynamic(readers: int) -> ir.Model:
    """Products of activations that are quantized at run time, in standard operators."""
    net = _Net((_ROWS, _COLUMNS))
    taken, scale, zero = net.dynamic(net.x)
    results = []
    for number in range(1, readers + 1):
        weight, point = net.integers(_INTEGERS["int8"], _COLUMNS, _COLUMNS), net.constant(np.zeros((), np.int8))
        product = net.op("MatMulInteger", taken, weight, zero, point)
        real = net.op("Cast", product, to=ir.DataType.FLOAT.value)
        results.append(net.op("Mul", real, net.op("Mul", scale, net.constant(np.array(_SCALE * number, np.float32)))))
    return net.model(functools.reduce(functools.partial(net.op, "Sub"), results))


def _floats(*op_types: str) -> ir.Model:
    """Float layers one behind the other; convolutions of one axis, since others have forms of the processor's own."""
    net = _Net((1, _ROWS, _COLUMNS))
    value = net.x
    for op_type in op_types:
        if op_type == "Conv":
            value = net.op("Conv", value, net.floats(_ROWS, _ROWS, 1))
        elif op_type == "Add":
            value = net.op("Add", value, net.op("Exp", net.x))
        elif op_type == "LayerNormalization":
            value = net.op("LayerNormalization", value, net.floats(_COLUMNS), net.floats(_COLUMNS))
        else:
            value = net.op(op_type, value)
    return net.model(value)


def _block_forms() -> Iterator[Form]:
    when: tuple[str, ...]
    into = "DequantizeLinear -> MatMul"
    for bits, block in itertools.product((2, 4, 8), (8, 16, 32, 64, 128, 256, 512)):
        yield Form(into, block_form(bits, block), functools.partial(_block_product, "MatMul", bits, block))
    weight = "int4 weight in blocks of 32"
    into = "DequantizeLinear -> Gemm"
    yield Form(into, (weight, "transB = 0"), functools.partial(_block_product, "Gemm", 4, 32))
    yield Form(into, (weight, "transB = 1"), functools.partial(_block_product, "Gemm", 4, 32, trans=True))
    into = "DequantizeLinear -> Transpose -> MatMul"
    yield Form(into, (weight,), functools.partial(_block_product, "MatMul", 4, 32, transpose=True))
    yield Form("DequantizeLinear -> Gather", (weight,), _looked_up)
    for bits, block, level in itertools.product((2, 4, 8), (16, 32, 64, 128, 256), (0, 4)):
        when = nbits_form((bits, block, level))
        yield Form("com.microsoft.MatMulNBits", when, functools.partial(_nbits, bits, block, level), measured=True)


def _quantized_forms() -> Iterator[Form]:
    when: tuple[str, ...]
    for op_type in ("Conv", "Gemm", "MatMul"):
        for activations, weights in (("uint8", "int8"), ("int8", "int8"), ("uint8", "uint8"), ("uint16", "int8")):
            when = (f"{activations} activations, {weights} weight",)
            yield Form(_between(op_type), when, functools.partial(_quantized_layer, op_type, activations, weights))
        when = ("uint8 activations, int8 weight", "the result is not quantized")
        build = functools.partial(_quantized_layer, op_type, "uint8", "int8", out=False)
        yield Form(f"DequantizeLinear -> {op_type}", when, build)
    for op_type in ("Add", "Mul", "Sub", "Div", "Concat", "Where", "Softmax", "Sigmoid", "LeakyRelu", "Relu", "Clip",
                    "Tanh", "Gelu", "HardSwish", "LayerNormalization", "ReduceMean", "AveragePool", "MaxPool",
                    "GlobalAveragePool", "Transpose", "Resize"):  # fmt: skip
        attributes = _ATTRIBUTES.get(op_type, {})
        for activations in ("uint8", "uint16") if op_type in ("Add", "Sigmoid") else ("uint8",):
            build = functools.partial(_quantized_layer, op_type, activations, **attributes)
            yield Form(_between(op_type), (f"{activations} activations",), build)
    for activations in ("uint8", "int8"):
        when = (f"{activations} activations", "zero point 0")
        yield Form(_between("Conv -> Relu"), when, functools.partial(_clamped, "Relu", activations))


_ATTRIBUTES: Mapping[str, Mapping[str, Any]] = {
    "AveragePool": {"kernel_shape": [2, 2]},
    "Concat": {"axis": 1},
    "MaxPool": {"kernel_shape": [2, 2]},
    "Resize": {"mode": "nearest"},
    "Transpose": {"perm": [0, 2, 3, 1]},
}


def _between(layer: str) -> str:
    return f"DequantizeLinear -> {layer} -> QuantizeLinear"


def _other_forms() -> Iterator[Form]:
    pattern = "DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul"
    yield Form(pattern, ("one product reads the activations",), functools.partial(_dynamic, 1))
    yield Form(pattern, ("two products read the activations",), functools.partial(_dynamic, 2))
    for op_types in (("Conv", "Relu"), ("Conv", "Add"), ("Conv", "Add", "Relu"), ("Add", "LayerNormalization")):
        yield Form(" -> ".join(op_types), ("float32", "shapes are known"), functools.partial(_floats, *op_types))


FORMS: tuple[Form, ...] = (*_block_forms(), *_quantized_forms(), *_other_forms())
"""Every form of which a table says something."""
