"""Models as Core ML packages, and what runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qgraph.coreml.lowering import lower
from qgraph.coreml.package import write_package
from qgraph.coreml.session import PackageSession
from qgraph.pipeline import Pipeline
from qgraph.runtime.session import open_session


@dataclasses.dataclass(frozen=True)
class Constant:
    """An input of a node that is an initializer."""

    array: np.ndarray


@dataclasses.dataclass(frozen=True)
class Case:
    """One node.

    Attributes:
        op: its operator.
        inputs: arrays that are fed, or constants; None for one that is left out.
        attributes: of the node.
        outputs: how many it has.
        opset: of the model.
        name: what tells it from other cases of the operator.
    """

    op: str
    inputs: Sequence[Any]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    outputs: int = 1
    opset: int = 21
    name: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.name}" if self.name else self.op

    def model(self) -> tuple[ir.Model, dict[str, np.ndarray]]:
        """Return the model, and a feed for it."""
        names = ["" if one is None else f"in{place}" for place, one in enumerate(self.inputs)]
        outputs = [f"out{place}" for place in range(self.outputs)]
        feeds = {name: one for name, one in zip(names, self.inputs, strict=True) if isinstance(one, np.ndarray)}
        constants = {name: one.array for name, one in zip(names, self.inputs, strict=True) if isinstance(one, Constant)}
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(self.op, names, outputs, name="node", **self.attributes)],
            "one",
            [onnx.helper.make_tensor_value_info(name, _type(one), one.shape) for name, one in feeds.items()],
            [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
            [onnx.numpy_helper.from_array(one, name) for name, one in constants.items()],
        )
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)), feeds


def _type(array: np.ndarray) -> int:
    return onnx.helper.np_dtype_to_tensor_dtype(array.dtype)


def package(model: ir.Model, folder: Path, passes: str = "infer-shapes") -> Path:
    """Write a model, after `passes`, as a package in `folder`; the model is changed."""
    Pipeline.parse(passes).run(model)
    written = folder / "model.mlpackage"
    write_package(lower(model), written)
    return written


def in_onnxruntime(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a model in ONNX Runtime, unoptimised."""
    session = open_session(ir.to_proto(model).SerializeToString(), optimise=False, threads=1)
    return list(session.run(None, dict(feeds)))


def assert_same(model: ir.Model, feeds: Mapping[str, np.ndarray], folder: Path, *, tolerance: float = 1e-5) -> Path:
    """Assert that the package of a model computes what ONNX Runtime does, up to a share of the largest number."""
    expected = in_onnxruntime(model, feeds)
    written = package(model, folder)
    for want, got in zip(expected, PackageSession(written).run(None, feeds), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        scale = max(1.0, float(np.abs(want[np.isfinite(want)]).max(initial=0))) if want.dtype.kind == "f" else 1.0
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale if want.dtype.kind == "f" else 0)
    return written
