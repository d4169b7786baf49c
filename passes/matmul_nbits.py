"""Compressed weights in the operators that ONNX Runtime multiplies them with as they are stored.

    y = MatMul(x, DequantizeLinear(Wq, s, z)) [+ b]       =>    y = MatMulNBits(x, B, s, z, , b)
    y = MatMul(x, Transpose(DequantizeLinear(...)))       =>    the same
    y = Gemm(x, DequantizeLinear(Wq, s, z), b)            =>    the same
    e = Gather(DequantizeLinear(Wq, s, z), ids)           =>    e = GatherBlockQuantized(B, ids, s, z)
    y = MatMul(x, DequantizeLinear(...))      of nf4      =>    y = MatMulBnb4(x, B, s)

    e = Gather(D, ids);  y = MatMul(h, Transpose(D))      =>    e = GatherBlockQuantized(B, ids, s, z)
    (a tied weight)                                             y = MatMulNBits(h, Reshape(B), s, z)

The operators (com.microsoft) have kernels for 2, 4 and 8 bits and blocks of 16 to 256 inputs. Other weights go to the
next form that holds the same numbers: 3 bits in 4, 5 and 6 in 8, ternary in 2, mxfp4 and nvfp4 in 8, a scale for a
whole row repeated over its blocks. Two bits have fast kernels for blocks of 32, 64 and 128 only (others silently
compute in float, twenty times slower): blocks of 16 go to 4 bits, and longer ones become several with one scale.
A tied weight of nf4 goes to 8 bits, where each level moves by at most 1/254: no look-up reads nf4.

`accuracy_level` 4 rounds activations to 8 bits, block by block, and multiplies in integers; 0 multiplies in float,
which for 2 and 8 bits is fifty times slower on a CPU.

Weights that others have stored in blocks or in less than 8 bits behind a DequantizeLinear are taken as well.

Left alone: float8 (no kernel; it is dequantized at every run), readers inside subgraphs, a Gemm with a transposed
input or a factor alpha, groups that are no multiple of 16, weights that are read across their groups, with `gapless`
tables whose rows fill no groups of any width, and with `table` what a runtime has no kernel for.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.compressed_weights import (
    NAME_KEY,
    SCHEME_KEY,
    CompressedWeight,
    compressed,
    format_scheme,
    producer_of,
)
from qgraph.lazy_tensors import joint_tensors
from qgraph.numerics.packing import container, gather_block_quantized, matmul_bnb4, matmul_nbits, to_container, widen
from qgraph.numerics.weights import QuantizedWeight, WeightScheme
from qgraph.passes._half_types import FLOAT16, rounded_scales
from qgraph.passes._kernels import TABLE_HELP, lacking
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["MatmulNbits"]

_MICROSOFT = "com.microsoft"
_BLOCKS = {2: (128, 64, 32), 4: (256, 128, 64, 32, 16), 8: (256, 128, 64, 32, 16)}
"""Blocks for which there are integer kernels, by bits."""
_SMALLEST_BLOCK = 16
_SCALE_BITS = 32
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_NF4 = 1
"""The operator's number for nf4."""


@dataclass(frozen=True)
class MatmulNbits(Pass):
    """Let ONNX Runtime's low-bit kernels read compressed weights as they are stored."""

    name: ClassVar[str] = "matmul-nbits"
    accuracy_level: Literal[0, 4] = field(
        default=4, metadata={"help": "4 rounds activations to 8 bits and multiplies in integers, 0 in float"}
    )
    exact: tuple[str, ...] = field(
        default=(), metadata={"help": "patterns (*, ?) of names of nodes that multiply in float all the same"}
    )
    nf4: Literal["exact", "int8"] = field(
        default="exact",
        metadata={"help": "run nf4 exactly, or ten times faster on a CPU in 8 bits, where levels move by up to 1/254"},
    )
    gapless: bool = field(
        default=False,
        metadata={"help": "look up only where groups fill rows and bytes, as CUDA reads them, in more bits if need be"},
    )
    table: str = field(default="", metadata={"help": TABLE_HELP})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Rewrite the readers; `skipped` has those that keep a dequantized weight."""
        del context
        counts: Counter[str] = Counter()
        skipped: list[Skipped] = []
        for weight in [one for one in compressed(model) if one.dequantize is not None]:
            rewriter = _Rewriter(model, weight, self)
            rewriter.run()
            counts.update(rewriter.counts)
            skipped += rewriter.skipped
        if counts:
            model.graph.opset_imports.setdefault(_MICROSOFT, 1)
        notes = [f"{count} {what}" for what, count in sorted(counts.items())]
        return Report(changed=sum(counts.values()), skipped=skipped, notes=notes)

    def level(self, node: ir.Node) -> int:
        """Return the accuracy level for a node."""
        label = qgraph.ir.node_label(node)
        return 0 if any(fnmatch.fnmatchcase(label, pattern) for pattern in self.exact) else self.accuracy_level


class _UnfitError(Exception):
    """The reason why a reader keeps its dequantized weight."""


class _Form(NamedTuple):
    """What kernels read: integers of `bits`, `block` inputs with one scale."""

    bits: int
    block: int

    def of(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return a weight in this form: the same numbers."""
        weight = widen(to_container(weight), self.bits)
        assert weight.zero_point is not None
        scheme = dataclasses.replace(weight.scheme, group=self.block)
        inputs = weight.codes.shape[1]
        blocks = np.arange(scheme.groups(inputs)) * self.block // (weight.scheme.group or inputs)
        return QuantizedWeight(weight.codes, weight.scale[:, blocks], weight.zero_point[:, blocks], scheme)


def _form(scheme: WeightScheme, inputs: int, *, looked_up: bool = False, gapless: bool = False) -> _Form:
    """Return the smallest form with kernels that holds a scheme's numbers.

    Args:
        scheme: of the weight.
        inputs: K.
        looked_up: rows are looked up: prefer a form without gaps between the rows of scales and zero points, which is
            how the CUDA provider reads them.
        gapless: rows that are looked up must have such a form.

    Raises:
        _UnfitError: there is none.
    """
    held = container(scheme)
    if not held.is_integer:
        raise _UnfitError(f"there is no kernel for {scheme.format}: it is dequantized to float at every run")
    # One scale for the row can be repeated over blocks of any size, the last of which may be ragged.
    group = held.group if held.groups(inputs) > 1 else 0
    for bits in (width for width in _BLOCKS if width >= held.bits):
        fitting = [block for block in _BLOCKS[bits] if group % block == 0]
        if looked_up:
            whole = [block for block in fitting if _is_gapless(inputs, bits, block, symmetric=held.symmetric)]
            fitting = whole if whole or gapless else fitting
        if fitting:
            return _Form(bits, min(fitting, key=lambda block: -(-inputs // block) * (block * bits + _SCALE_BITS)))
    if group % _SMALLEST_BLOCK == 0:
        raise _UnfitError(f"its rows of {inputs} do not fill groups and bytes, as CUDA reads them: it is dequantized")
    raise _UnfitError(f"its groups of {group} inputs are not a multiple of 16, so there is no kernel for them")


def _is_gapless(inputs: int, bits: int, block: int, *, symmetric: bool) -> bool:
    return inputs % block == 0 and (symmetric or inputs // block * bits % 8 == 0)


class _Rewriter:
    """Gives the readers of one weight their operators."""

    def __init__(self, model: ir.Model, weight: CompressedWeight, options: MatmulNbits) -> None:
        assert weight.dequantize is not None
        self._model = model
        self._weight = weight
        self._options = options
        self._dequantize = weight.dequantize
        self._float = weight.tensors[1].dtype
        self._produce = producer_of(weight.tensors[0]) or weight.quantized
        self.counts: Counter[str] = Counter()
        self.skipped: list[Skipped] = []

    def run(self) -> None:
        products: list[ir.Node] = []
        lookups: list[ir.Node] = []
        for reader in self._weight.readers:
            try:
                self._require(reader)
            except _UnfitError as reason:
                self.skipped.append(Skipped(qgraph.ir.node_label(reader), str(reason)))
                continue
            (lookups if reader.op_type == "Gather" else products).append(reader)
        if not products and not lookups:
            return
        scheme = self._weight.scheme
        if scheme.format == "nf4" and not lookups and self._options.nf4 == "exact" and self._fits_bnb4():
            self._bnb4(products)
        else:
            form = _form(scheme, self._weight.inputs, looked_up=bool(lookups), gapless=self._options.gapless)
            # Products read rows that are filled up to whole blocks, look-ups do not.
            together = self._weight.inputs % form.block == 0
            for group in ((products, lookups),) if together else ((products, []), ([], lookups)):
                if any(group):
                    self._nbits(*group, form)
        self._clean()

    def _require(self, reader: ir.Node) -> None:
        is_lookup, gapless = qgraph.ir.is_op(reader, "Gather"), self._options.gapless
        form = _form(self._weight.scheme, self._weight.inputs, looked_up=is_lookup, gapless=gapless)
        if self._float not in _FLOATS:
            raise _UnfitError("its weight is not float32, float16 or bfloat16")
        if reader.graph is not self._model.graph:
            raise _UnfitError("it lies inside a subgraph")
        self._require_kernel(reader, form)
        if is_lookup:
            if not self._weight.transposed or reader.attributes.get_int("axis", 0) not in (0, -2):
                raise _UnfitError("it looks up across the groups of its table")
            if self._weight.inputs * form.bits % 8:
                raise _UnfitError(f"rows of {self._weight.inputs} in {form.bits} bits do not fill whole bytes")
            return
        if not qgraph.ir.is_op(reader, "MatMul", "Gemm"):
            raise _UnfitError("it is no product and no look-up")
        right = reader.inputs[1]
        if right is None or self._source(right) is not self._dequantize.outputs[0]:
            raise _UnfitError("its compressed weight is not the right factor")
        flipped = (right is not self._dequantize.outputs[0]) != bool(reader.attributes.get_int("transB", 0))
        if flipped != self._weight.transposed:
            raise _UnfitError("it multiplies across the groups of its weight")
        if reader.attributes.get_int("transA", 0):
            raise _UnfitError("its input is transposed")
        if reader.attributes.get_float("alpha", 1.0) != 1.0:
            raise _UnfitError("its product has a factor alpha")

    def _require_kernel(self, reader: ir.Node, form: _Form) -> None:
        """Ask the table, if there is one, for a kernel of the operator that would be written."""
        table = self._options.table
        attributes = {"bits": form.bits, "block_size": form.block}
        types: tuple[ir.DataType | None, ...] = (self._float, ir.DataType.UINT8, self._float)
        if qgraph.ir.is_op(reader, "Gather"):
            indices = None if reader.inputs[1] is None else reader.inputs[1].dtype
            types = (ir.DataType.UINT8, indices, self._float)
            reason = lacking("com.microsoft.GatherBlockQuantized", types, table, attributes=attributes)
        elif self._weight.scheme.format == "nf4" and self._options.nf4 == "exact" and self._fits_bnb4():
            reason = lacking("com.microsoft.MatMulBnb4", types, table)
        else:
            reason = lacking("com.microsoft.MatMulNBits", types, table, attributes=attributes)
        if reason is not None:
            raise _UnfitError(reason)

    def _source(self, value: ir.Value) -> ir.Value | None:
        """Look through a Transpose that swaps the two dimensions."""
        node = value.producer()
        if node is not None and qgraph.ir.is_op(node, "Transpose"):
            return node.inputs[0] if list(node.attributes.get_ints("perm", (1, 0))) == [1, 0] else None
        return value

    def _fits_bnb4(self) -> bool:
        group, inputs = self._weight.scheme.group or self._weight.inputs, self._weight.inputs
        return inputs % group == 0 and group >= 16 and group & (group - 1) == 0

    def _bnb4(self, products: Sequence[ir.Node]) -> None:
        weight, produce = self._weight, self._produce
        group = weight.scheme.group or weight.inputs
        elements = weight.outputs * weight.inputs

        def arrays() -> Sequence[np.ndarray | None]:
            return matmul_bnb4(produce())[:2]

        specs = [(ir.DataType.UINT8, (elements // 2,)), (self._float_type(), (elements // group,))]
        values = self._initializers(arrays, specs, "nf4")
        attributes = {"K": weight.inputs, "N": weight.outputs, "block_size": group, "quant_type": _NF4}
        for reader in products:
            self._replace(reader, "MatMulBnb4", values, attributes)

    def _nbits(self, products: Sequence[ir.Node], lookups: Sequence[ir.Node], form: _Form) -> None:
        """Store the weight once in a form for all readers; products read a tied one through a Reshape."""
        weight, produce = self._weight, self._produce
        rows, groups = weight.outputs, -(-weight.inputs // form.block)
        cells = (rows, groups, form.block * form.bits // 8)
        zeros = -(-groups * form.bits // 8)
        symmetric = container(weight.scheme).symmetric

        def arrays() -> Sequence[np.ndarray | None]:
            packed = (gather_block_quantized if lookups else matmul_nbits)(form.of(produce()))
            return packed[:3]

        specs = [
            (ir.DataType.UINT8, (rows, weight.inputs * form.bits // 8) if lookups else cells),
            (self._float_type(), (rows, groups) if lookups else (rows * groups,)),
        ]
        if not symmetric:
            specs.append((ir.DataType.UINT8, (rows, zeros) if lookups else (rows * zeros,)))
        codes, *parameters = self._initializers(arrays, specs, f"int{form.bits}")
        shared = {"bits": form.bits, "block_size": form.block}
        for reader in lookups:
            attributes = {**shared, "gather_axis": 0, "quantize_axis": 1}
            self._replace(reader, "GatherBlockQuantized", [codes, *parameters], attributes)
        if lookups and products:
            codes = self._reshaped(codes, cells, products[0])
        for reader in products:
            level = self._options.level(reader)
            attributes = {"K": weight.inputs, "N": rows, **shared, "accuracy_level": level}
            self._replace(reader, "MatMulNBits", [codes, *parameters], attributes)

    def _float_type(self) -> ir.DataType:
        assert self._float is not None
        return self._float

    def _initializers(
        self,
        arrays: Callable[[], Sequence[np.ndarray | None]],
        specs: Sequence[tuple[ir.DataType, Sequence[int]]],
        form: str,
    ) -> list[ir.Value]:
        nodes = [qgraph.ir.node_label(node) for node in (self._dequantize, *self._weight.readers)]

        def compute() -> Sequence[ir.TensorProtocol]:
            given = [array for array in arrays() if array is not None]
            return [
                ir.Tensor(
                    np.ascontiguousarray(_narrowed(array, dtype, nodes), dtype.numpy()).reshape(shape), dtype=dtype
                )
                for array, (dtype, shape) in zip(given, specs, strict=True)
            ]

        tensors = joint_tensors(compute, specs, source=self._produce)
        parts = (form, f"{form}_scale", f"{form}_zero_point")
        return [
            qgraph.ir.initializer(self._model.graph, f"{self._weight.name}_{part}", tensor)
            for part, tensor in zip(parts, tensors, strict=False)
        ]

    def _reshaped(self, codes: ir.Value, cells: tuple[int, ...], before: ir.Node) -> ir.Value:
        """Return packed rows as blocks: ONNX Runtime computes a Reshape of an initializer when it opens the model."""
        shape = qgraph.ir.initializer(self._model.graph, f"{self._weight.name}_blocks", np.array(cells, np.int64))
        node = ir.node("Reshape", [codes, shape], name=qgraph.ir.fresh_name(self._model.graph, f"{codes.name}_reshape"))
        output = node.outputs[0]
        output.name = qgraph.ir.fresh_name(self._model.graph, f"{codes.name}_blocks")
        output.type, output.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape(cells)
        qgraph.ir.insert_before(before, node)
        return output

    def _replace(self, reader: ir.Node, op_type: str, values: Sequence[ir.Value], attributes: dict[str, int]) -> None:
        """Put the fused operator in the place of a product or a look-up, and of the Add of a bias behind it."""
        last, bias, added = reader, None, None
        if reader.op_type == "Gemm" and len(reader.inputs) > 2:
            bias = reader.inputs[2]
            if bias is not None and (op_type == "MatMulBnb4" or not self._is_bias(bias, reader)):
                bias, added = None, bias
        elif reader.op_type == "MatMul" and op_type == "MatMulNBits":
            last, bias = self._biased(reader)
        if op_type == "GatherBlockQuantized":
            inputs = [values[0], reader.inputs[1], *values[1:]]
        else:
            inputs = [reader.inputs[0], *values]
        if bias is not None:
            inputs += [None] * (5 - len(inputs)) + [bias]
        new = ir.node(op_type, inputs, attributes, domain=_MICROSOFT, name=reader.name)
        new.metadata_props.update(reader.metadata_props)
        new.metadata_props[SCHEME_KEY] = format_scheme(self._weight.scheme)
        new.metadata_props[NAME_KEY] = self._weight.name
        nodes = [new] if added is None else [new, *self._added(new, added, reader)]
        qgraph.ir.replace_node(last, nodes)
        if last is not reader:
            qgraph.ir.discard(reader)
        self.counts[op_type] += 1

    def _biased(self, product: ir.Node) -> tuple[ir.Node, ir.Value | None]:
        """Return the Add of a bias behind a MatMul, and the bias; the MatMul itself where there is none."""
        add = qgraph.ir.only_consumer(product.outputs[0])
        if add is None or not qgraph.ir.is_op(add, "Add") or add.graph is not product.graph:
            return product, None
        other = add.inputs[1] if add.inputs[0] is product.outputs[0] else add.inputs[0]
        return (add, other) if other is not None and self._is_bias(other, product) else (product, None)

    def _is_bias(self, value: ir.Value, product: ir.Node) -> bool:
        """Tell whether a constant has one number for each output, which MatMulNBits adds as it comes."""
        if value.const_value is None or value.is_graph_input() or value.dtype != self._float:
            return False
        shape = tuple(value.const_value.shape.numpy())
        return shape == (self._weight.outputs,) and product.attributes.get_float("beta", 1.0) == 1.0

    def _added(self, product: ir.Node, bias: ir.Value, gemm: ir.Node) -> list[ir.Node]:
        """Return the nodes that add what a Gemm adds, where the operator cannot."""
        graph, nodes = self._model.graph, list[ir.Node]()
        product.outputs[0].name = qgraph.ir.fresh_name(graph, f"{gemm.outputs[0].name}_product")
        product.outputs[0].type, product.outputs[0].shape = gemm.outputs[0].type, gemm.outputs[0].shape
        beta = gemm.attributes.get_float("beta", 1.0)
        if beta != 1.0:
            factor = qgraph.ir.initializer(graph, f"{gemm.name}_beta", np.array(beta, self._float_type().numpy()))
            scaled = ir.node("Mul", [bias, factor], name=qgraph.ir.fresh_name(graph, f"{gemm.name}_scale_bias"))
            scaled.outputs[0].name = qgraph.ir.fresh_name(graph, f"{bias.name}_scaled")
            scaled.outputs[0].type = bias.type
            nodes.append(scaled)
            bias = scaled.outputs[0]
        nodes.append(ir.node("Add", [product.outputs[0], bias], name=qgraph.ir.fresh_name(graph, f"{gemm.name}_bias")))
        return nodes

    def _clean(self) -> None:
        """Remove what nobody reads any more: Transposes, the DequantizeLinear, its tensors."""
        output = self._dequantize.outputs[0]
        for node in {use.node for use in output.uses()}:
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                qgraph.ir.discard(node)
        if output.uses() or output.is_graph_output():
            return
        qgraph.ir.discard(self._dequantize)
        for value in self._weight.tensors:
            if not value.uses() and value.graph is not None:
                value.graph.initializers.pop(value.name or "")


def _narrowed(array: np.ndarray, dtype: ir.DataType, nodes: Sequence[str]) -> np.ndarray:
    """Round scales to float16, if that can hold them; integers stay."""
    return rounded_scales(array, FLOAT16, nodes) if dtype == FLOAT16.dtype and array.dtype == np.float32 else array
