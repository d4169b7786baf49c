"""Which operators become integers: each in a model of its own, here and by the peers.

    python benchmarks/integer_operators.py FOLDER        writes the models, for the peers (see `integer_peers.py`)

A model holds one operator on float inputs. Ours counts as integer when the target `integer` leaves nothing in float,
and the reference executor and ONNX Runtime give the same bits. What onnxsim and QONNX do with the same models was found
by `integer_peers.py` and is kept in integer_peers.json. FINN is not on the package index: its column is what its
documentation lists, and was not run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import integer_bits
import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir
import pruning
import timing
from onnx import TensorProto, helper, numpy_helper

import qgraph.ir
from qgraph.errors import UserError
from qgraph.passes.integer_requantize import BOUNDARY_KEY
from qgraph.runtime.reference import ReferenceSession
from qgraph.targets.integer import Integer

__all__ = ["CASES", "FINN", "PEERS", "Case", "claims", "measure", "render"]

Figures = dict[str, Any]
PEERS = Path(__file__).resolve().parent / "integer_peers.json"
IMAGE, ROWS = (1, 4, 8, 8), (2, 6, 8)
_FEEDS = 8
_OPSET = 20
_OPSETS = {"GroupNormalization": 21, "RMSNormalization": 23}

Source = tuple[int, ...] | np.ndarray | None


@dataclass(frozen=True)
class Case:
    """A model of one operator.

    Attributes:
        op_type: the operator.
        inputs: what it reads, in order: a shape for an input in float, an array for a constant, None for none.
        attributes: of the node.
        limits: between which the inputs lie, such as where the operator is defined.
        outputs: how many it has.
        variant: what tells it from other cases of the operator.
    """

    op_type: str
    inputs: tuple[Source, ...] = (IMAGE,)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[float, float] = (-2.0, 2.0)
    outputs: int = 1
    variant: str = ""

    @property
    def name(self) -> str:
        """The operator, with its variant."""
        return self.op_type + (f" ({self.variant})" if self.variant else "")

    def model(self) -> onnx.ModelProto:
        """Return the model."""
        inputs, constants, names = [], [], []
        for index, one in enumerate(self.inputs):
            name = "" if one is None else f"x{index}"
            names.append(name)
            if isinstance(one, np.ndarray):
                constants.append(numpy_helper.from_array(one, name))
            elif one is not None:
                inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, one))
        outputs = [f"y{index}" for index in range(self.outputs)]
        node = helper.make_node(self.op_type, names, outputs, name="n", **self.attributes)
        values = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph([node], "one", inputs, values, constants)
        imports = [helper.make_opsetid("", _OPSETS.get(self.op_type, _OPSET))]
        model = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=imports, ir_version=10))
        del model.graph.value_info[:]  # the outputs' again, which QONNX refuses
        for value in model.graph.output:
            if not value.type.HasField("tensor_type"):  # onnx does not infer GroupNormalization
                value.type.CopyFrom(model.graph.input[0].type)
        return model

    def feeds(self, seed: int) -> dict[str, np.ndarray]:
        """Return one feed of the model."""
        random = np.random.default_rng(seed)
        return {
            f"x{index}": random.uniform(*self.limits, one).astype(np.float32)
            for index, one in enumerate(self.inputs)
            if isinstance(one, tuple)
        }


def _weight(*shape: int) -> np.ndarray:
    return (np.random.default_rng(len(shape)).normal(size=shape) * 0.3).astype(np.float32)


def _integers(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def _float(number: float) -> np.ndarray:
    return np.array(number, np.float32)


_UNARY = (
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp",
    "Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round",
    "Selu", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_POSITIVE = (0.1, 2.0)
_LIMITS = {
    **dict.fromkeys(("Log", "Reciprocal", "Sqrt"), _POSITIVE),
    **dict.fromkeys(("Acos", "Asin", "Atanh"), (-0.9, 0.9)),
    "Acosh": (1.1, 3.0),
    "Tan": (-1.2, 1.2),
}
_HW = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
_TWO = {"kernel_shape": [2, 2], "strides": [2, 2]}
_SIZES = np.array([1, 1, 2, 2], np.float32)


def _layers() -> list[Case]:
    return [
        Case("Conv", (IMAGE, _weight(6, 4, 3, 3), _weight(6)), _HW),
        Case("Conv", (IMAGE, _weight(4, 1, 3, 3)), {**_HW, "group": 4}, variant="depthwise"),
        Case("Conv", ((1, 4, 16), _weight(6, 4, 3)), {"dilations": [2]}, variant="1-D, dilated"),
        Case("ConvTranspose", (IMAGE, _weight(4, 6, 2, 2)), _TWO),
        Case("Gemm", ((6, 8), _weight(8, 5), _weight(5))),
        Case("Gemm", ((6, 8), _weight(8, 5), _weight(6, 5)), variant="matrix added"),
        Case("Gemm", ((6, 8), (8, 5), (6, 1)), variant="three activations"),
        Case("MatMul", (ROWS, _weight(8, 5))),
        Case("MatMul", (ROWS, _weight(8)), variant="vector"),
        Case("MatMul", (ROWS, (2, 8, 5)), variant="two activations"),
        Case("Einsum", (ROWS, (2, 5, 8)), {"equation": "bik,bjk->bij"}),
        Case("LSTM", ((5, 1, 4), _weight(1, 12, 4), _weight(1, 12, 3)), {"hidden_size": 3}, outputs=2),
        Case("GRU", ((5, 1, 4), _weight(1, 9, 4), _weight(1, 9, 3)), {"hidden_size": 3}, outputs=2),
        Case("RNN", ((5, 1, 4), _weight(1, 3, 4), _weight(1, 3, 3)), {"hidden_size": 3}, outputs=2),
    ]


def _arithmetic() -> list[Case]:
    return [
        *(Case(one, limits=_LIMITS.get(one, (-2.0, 2.0))) for one in _UNARY),
        *(Case(one, (IMAGE, IMAGE)) for one in ("Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean")),
        Case("PRelu", (IMAGE, _weight(4, 1, 1))),
        Case("Add", (IMAGE, _weight(4, 1, 1)), variant="constant"),
        Case("Mul", (IMAGE, _weight(4, 1, 1)), variant="constant"),
        Case("Div", (IMAGE, IMAGE), limits=_POSITIVE),
        Case("Div", (IMAGE, _float(3.0)), variant="constant"),
        Case("Pow", (IMAGE, _float(2.0))),
        Case("Mod", (IMAGE, _float(0.5)), {"fmod": 1}),
        Case("Clip", (IMAGE, _float(0.0), _float(1.5))),
        *(Case(one, (IMAGE, IMAGE)) for one in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
        Case("Less", (IMAGE, _weight(4, 1, 1)), variant="constant"),
        Case("Where", (np.arange(8) % 2 == 0, IMAGE, IMAGE)),
        Case("Softmax", (ROWS,), {"axis": -1}),
        Case("LogSoftmax", (ROWS,), {"axis": -1}),
        Case("Hardmax", (ROWS,), {"axis": -1}),
        Case("LayerNormalization", (ROWS, _weight(8), _weight(8)), {"axis": -1}),
        Case("RMSNormalization", (ROWS, _weight(8)), {"axis": -1}),
        Case("InstanceNormalization", (IMAGE, _weight(4), _weight(4))),
        Case("GroupNormalization", (IMAGE, _weight(4), _weight(4)), {"num_groups": 2}),
        Case("BatchNormalization", (IMAGE, _weight(4), _weight(4), _weight(4), np.abs(_weight(4)) + 0.5)),
        Case("LpNormalization", (ROWS,)),
        Case("LRN", (IMAGE,), {"size": 3}),
        Case("CumSum", (ROWS, np.array(1, np.int64))),
    ]


def _reductions() -> list[Case]:
    axes = _integers(2)
    reductions = ("Sum", "Mean", "Max", "Min", "L1", "L2", "SumSquare", "Prod", "LogSum", "LogSumExp")
    return [
        *(Case(f"Reduce{one}", (ROWS, axes), limits=_POSITIVE) for one in reductions),
        Case("AveragePool", attributes=_TWO),
        Case("AveragePool", attributes=_HW, variant="padded"),
        Case(
            "AveragePool", attributes={"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, variant="ceil_mode"
        ),
        Case("GlobalAveragePool"),
        Case("MaxPool", attributes=_TWO),
        Case("GlobalMaxPool"),
        Case("LpPool", attributes=_TWO),
        Case("ArgMax", (ROWS,), {"axis": -1}),
        Case("ArgMin", (ROWS,), {"axis": -1}),
        Case("TopK", (ROWS, _integers(3)), outputs=2),
    ]


def _movements() -> list[Case]:
    return [
        Case("Concat", (IMAGE, IMAGE), {"axis": 1}),
        Case("DepthToSpace", attributes={"blocksize": 2}),
        Case("SpaceToDepth", attributes={"blocksize": 2}),
        Case("Dropout"),
        Case("Expand", ((1, 4, 1, 8), _integers(1, 4, 8, 8))),
        Case("Flatten"),
        Case("Gather", (IMAGE, _integers(2, 0)), {"axis": 1}),
        Case("GatherElements", (ROWS, np.zeros((2, 6, 3), np.int64)), {"axis": 2}),
        Case("GatherND", (ROWS, np.array([[0, 1], [1, 3]], np.int64))),
        Case("GridSample", (IMAGE, (1, 5, 5, 2))),
        Case("Identity"),
        Case("Pad", (IMAGE, _integers(0, 0, 1, 1, 0, 0, 1, 1))),
        Case("Pad", (IMAGE, _integers(0, 0, 1, 1, 0, 0, 1, 1)), {"mode": "reflect"}, variant="reflect"),
        Case("Reshape", (IMAGE, _integers(1, -1))),
        Case("Resize", (IMAGE, None, _SIZES), {"mode": "nearest"}),
        Case("Resize", (IMAGE, None, _SIZES), {"mode": "linear"}, variant="linear"),
        Case("Resize", (IMAGE, None, _SIZES), {"mode": "cubic"}, variant="cubic"),
        Case("ScatterElements", (ROWS, np.zeros((2, 1, 8), np.int64), (2, 1, 8)), {"axis": 1}),
        Case("ScatterND", (ROWS, np.array([[0], [1]], np.int64), (2, 6, 8))),
        Case("Slice", (IMAGE, _integers(1), _integers(7), _integers(2), _integers(2))),
        Case("Split", (IMAGE, _integers(1, 3)), {"axis": 1}, outputs=2),
        Case("Squeeze", (IMAGE, _integers(0))),
        Case("Tile", (ROWS, _integers(1, 2, 1))),
        Case("Transpose", attributes={"perm": [0, 2, 3, 1]}),
        Case("Trilu", (ROWS,)),
        Case("Unsqueeze", (ROWS, _integers(0))),
    ]


CASES = (*_layers(), *_arithmetic(), *_reductions(), *_movements())

FINN = frozenset({
    "Add", "Add (constant)", "ArgMax", "AveragePool", "BatchNormalization", "Clip", "Concat", "Conv",
    "Conv (1-D, dilated)", "Conv (depthwise)", "ConvTranspose", "Div (constant)", "Flatten", "Gather", "Gemm",
    "GlobalAveragePool", "Identity", "MatMul", "MatMul (two activations)", "MaxPool", "Mul", "Mul (constant)", "Pad",
    "Relu", "Reshape", "Resize", "Sign", "Split", "Squeeze", "Sub", "TopK", "Transpose", "Unsqueeze",
})  # fmt: skip
"""What FINN's streamlining turns into integers (scales moved into thresholds) or its hardware layers compute in them,
by its documentation up to version 0.10: MVAU and VVAU, Thresholding, Pool, GlobalAccPool, AddStreams,
ElementwiseBinary, ChannelwiseOp, StreamingConcat and StreamingSplit, Upsample, FMPadding, PixelPadding, LabelSelect,
Lookup."""


def ours(case: Case) -> str:
    """Return '' if an operator becomes integers, else why not."""
    feeds = [case.feeds(seed) for seed in range(_FEEDS)]
    try:
        model = integer_bits.compiled(ir.from_proto(case.model()), feeds)
    except UserError as error:
        return str(error)
    reasons = [node.metadata_props.get(BOUNDARY_KEY) for node in qgraph.ir.walk(model)]
    found = [reason for reason in reasons if reason] + [one.reason for one in Integer().check(model)]
    if found:
        return found[0]
    with tempfile.TemporaryDirectory(prefix="qgraph-integer-") as scratch:
        path = Path(scratch) / "model.onnx"
        qgraph.ir.save(model, path)
        other = ReferenceSession(path).run(None, feeds[0])
        try:
            one = timing.session(path, threads=1).run(None, feeds[0])
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's have no class in common
            return f"ONNX Runtime does not run it: {str(error).split(' : ')[-1].split('failed:')[-1][:160]}"
    return f"{count} elements differ" if (count := integer_bits.differing(one, other)) else ""


def measure() -> Figures:
    """Return a row for each case: '' where it becomes integers, else why not; the peers' as they are kept."""
    kept = json.loads(PEERS.read_text())
    rows = []
    for case in CASES:
        peers = kept["operators"].get(case.name, {})
        row = {"name": case.name, "qgraph": ours(case), **{column: peers.get(column) for column in _COLUMNS}}
        rows.append({**row, "finn": case.name in FINN})
        print(f"  {case.name:<28} {row['qgraph'] or 'integer'}", flush=True)
    return {"rows": rows, "claims": claims(rows), "versions": kept["versions"], "date": kept["date"]}


_COLUMNS = {
    "onnxsim_qdq": "onnxsim: wrapped in Q and DQ",
    "onnxsim_bounds": "onnxsim: bounds for its integer checks",
    "qonnx": "QONNX: integer type inferred",
}


_HOW = """\
Each operator in a model of its own. qgraph: nothing is left in float, and the reference executor and ONNX Runtime \
give the same bits. Peers ({versions}; {date}), on the same models: onnxsim's `quantize_full_qdq` puts Q and DQ around \
the operator, which stays in float in between; its integer checks (`certify_no_overflow`, `quant_int_verify`) prove \
MatMulInteger, ConvInteger, QLinearMatMul and QLinearConv, and bound the results that the second column names. QONNX's \
`InferDataTypes` gives the result an integer type for integer inputs; QONNX's own operators (Quant, IntQuant, \
BipolarQuant, Trunc, MultiThreshold, QuantAvgPool2d, XnorPopcountMatMul, Im2Col, MaxPoolNHWC) are not ONNX's and not \
in the table. FINN is not on the package index: by its documentation, not run."""


def claims(rows: Sequence[Figures]) -> list[Figures]:
    """Return for each peer whether ours has all that it has."""
    found = []
    for column in (*_COLUMNS, "finn"):
        theirs = [row for row in rows if row[column]]
        missing = [row["name"] for row in theirs if row["qgraph"]]
        text = f"{len(theirs) - len(missing)} of {len(theirs)}" + (f"; not: {', '.join(missing)}" if missing else "")
        what = _COLUMNS.get(column, "FINN, by its documentation")
        found.append(pruning.claim(f"operators of {what}", "all integer in ours", text, not missing))
    return found


def render(part: Figures) -> str:
    """Return the table, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    lines = [
        "## Which operators become integers",
        "",
        _HOW.format(versions=versions, date=part["date"]),
        "",
        f"| operator | qgraph | {' | '.join(_COLUMNS.values())} | FINN |",
        "|" + "---|" * (len(_COLUMNS) + 3),
    ]
    for row in part["rows"]:
        cells = ["yes" if not row["qgraph"] else f"**no**: {row['qgraph']}".replace("|", "/")]
        cells += ["?" if row[column] is None else "yes" if row[column] else "" for column in _COLUMNS]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {'yes' if row['finn'] else ''} |")
    lines += ["", "| what | must reach | found | reached |", "|---|---|---|---|"]
    for one in part["claims"]:
        lines.append(f"| {one['what']} | {one['must']} | {one['found']} | {'yes' if one['reached'] else '**no**'} |")
    return "\n".join(lines) + "\n"


def main(folder: Path) -> int:
    """Write the models as NUMBER.onnx, and their names in order as names.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(CASES):
        onnx.save(case.model(), folder / f"{number}.onnx")
    (folder / "names.json").write_text(json.dumps([[case.name, case.op_type, case.limits] for case in CASES]))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
