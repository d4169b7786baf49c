"""Models of the tests, most of them written as text, on random numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.runtime.session import open_session

__all__ = ["normal_feeds", "ran"]


def normal_feeds(model: ir.Model, **sizes: int) -> dict[str, np.ndarray]:
    """Return normal numbers for every input, float32; `sizes` are those of the axes that have names."""
    random = np.random.default_rng(0)
    return {
        str(value.name): random.normal(size=[sizes.get(str(dim), dim) for dim in value.shape]).astype(np.float32)
        for value in model.graph.inputs
    }


def ran(model: ir.Model, **sizes: int) -> list[np.ndarray]:
    """Return what ONNX Runtime computes without optimising anything, on `normal_feeds`."""
    session = open_session(ir.to_proto(model).SerializeToString(), threads=1, optimise=False)
    return list(session.run(None, normal_feeds(model, **sizes)))
