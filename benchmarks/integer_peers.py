"""What onnxsim and QONNX do with the models of one operator each that `integer_operators.py` writes.

    python -m venv PEERS && PEERS/bin/python -m pip install onnxsim==0.8.1 qonnx==1.0.0
    python benchmarks/integer_operators.py FOLDER
    PEERS/bin/python benchmarks/integer_peers.py FOLDER benchmarks/integer_peers.json

Three questions for each operator: does onnxsim's `quantize_full_qdq` put a DequantizeLinear before and a
QuantizeLinear behind it; does onnxsim's interval analysis, on which its integer checks stand, bound its result for
bounded inputs; does QONNX's `InferDataTypes` give its result an integer type when its inputs and constants are 8-bit
integers.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

__all__: list[str] = []


def wrapped(model: onnx.ModelProto, op_type: str, limits: list[float]) -> bool:
    """Tell whether onnxsim quantizes all that the operator reads and makes in float."""
    from onnxsim.full_qdq import quantize_full_qdq

    random = np.random.default_rng(0)
    shapes = {one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in model.graph.input}
    feeds = [
        {name: random.uniform(*limits, shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(4)
    ]
    graph = quantize_full_qdq(model, feeds).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    inputs = [name for node in graph.node if node.op_type == op_type for name in node.input if name in makers]
    outputs = [name for node in graph.node if node.op_type == op_type for name in node.output]
    readers = [node.op_type for node in graph.node for name in node.input if name in outputs]
    dequantized = bool(inputs) and all(makers[name] == "DequantizeLinear" for name in inputs)
    return dequantized and bool(readers) and set(readers) == {"QuantizeLinear"}


def bounded(model: onnx.ModelProto, op_type: str, limits: list[float]) -> bool:
    """Tell whether onnxsim's interval analysis bounds the result."""
    del op_type
    from onnxsim import interval

    ranges = {one.name: tuple(limits) for one in model.graph.input}
    found = interval.propagate(model, ranges).intervals.get(model.graph.output[0].name)
    return found is not None and bool(np.isfinite(found[0]).all() and np.isfinite(found[1]).all())


def integer_typed(model: onnx.ModelProto, op_type: str, limits: list[float]) -> bool:
    """Tell whether QONNX gives the result an integer type."""
    del op_type, limits
    from qonnx.core.datatype import DataType
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_datatypes import InferDataTypes

    wrapper = ModelWrapper(model)
    for one in (*model.graph.input, *model.graph.initializer):
        wrapper.set_tensor_datatype(one.name, DataType["INT8"])
    found = wrapper.transform(InferDataTypes()).get_tensor_datatype(model.graph.output[0].name)
    return bool(found.is_integer())


_QUESTIONS = {"onnxsim_qdq": wrapped, "onnxsim_bounds": bounded, "qonnx": integer_typed}


def main(folder: Path, result: Path) -> int:
    warnings.simplefilter("ignore")
    found: dict[str, dict[str, Any]] = {}
    for number, (name, op_type, limits) in enumerate(json.loads((folder / "names.json").read_text())):
        row: dict[str, Any] = {}
        for column, ask in _QUESTIONS.items():
            try:
                row[column] = ask(onnx.load(folder / f"{number}.onnx"), op_type, limits)
            except Exception as error:  # noqa: BLE001 - a peer's, of any kind
                row[column] = False
                row[f"{column}_error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        found[name] = row
        print(name, row, flush=True)
    versions = {package: version(package) for package in ("onnxsim", "qonnx")}
    document = {"versions": versions, "date": dt.date.today().isoformat(), "operators": found}
    result.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
