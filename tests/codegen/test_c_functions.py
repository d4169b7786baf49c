"""The integer functions of domain "qgraph" as C, against their definitions on arrays."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.codegen.c_source import emit_c
from qgraph.errors import UserError
from qgraph.numerics import integer_math
from qgraph.numerics.requantize import ROUNDINGS, requantize

sys.path.insert(0, str(Path(__file__).parent))
from c_build import FLAGS, Graph, Library, needs_gcc

RANDOM = np.random.default_rng(11)
CHANNELS = 63
MULTIPLIER = RANDOM.integers(1 << 30, 1 << 31, (CHANNELS, 1)).astype(np.int32)
MULTIPLIER[::7] = 0
MULTIPLIER[1::7] = 1 << 30  # a power of two, so that halves occur
SHIFT = np.arange(CHANNELS, dtype=np.int32).reshape(CHANNELS, 1)
KINDS = {
    "uint8": (3, 0, 255),
    "int8": (-7, -128, 127),
    "int16": (0, -30000, 32767),
    "int32": (9, -(1 << 31), (1 << 31) - 1),
}


def spread() -> np.ndarray:
    """Return int32 of every size, halves and the ends of the type among them, one row for each shift."""
    exponent = RANDOM.integers(0, 31, (CHANNELS, 400))
    x = (RANDOM.integers(-(1 << 31), 1 << 31, exponent.shape) >> exponent).astype(np.int32)
    x[:, :8] = [0, 1, -1, 2, -2, 3, (1 << 31) - 1, -(1 << 31)]
    x[:, 8:40] = np.arange(-16, 16)
    places = np.clip(SHIFT - 31, 0, 30)
    x[:, 40:60] = (RANDOM.integers(-2, 3, (CHANNELS, 20)) * 2 + 1) << np.clip(places, 0, 28)
    return x


X = spread()
SCORES = RANDOM.integers(-3000, 3000, (2, 3, 40)).astype(np.int32)
TABLE = np.round((1 << 15) * np.exp(-np.arange(65) / 6)).astype(np.int32)
CURVE = RANDOM.integers(-(1 << 22), 1 << 22, 513).astype(np.int32)
WIDE = np.arange(-(1 << 15), 1 << 15, 7).astype(np.int16)
WIDE[-1] = (1 << 15) - 1
SQUARES = np.concatenate([np.arange(300), np.arange(1, 1 << 31, 1 << 23) ** 2, np.arange(1, 1 << 31, 1 << 23) ** 2 - 1])
DIVIDENDS = np.concatenate([np.arange(-40, 41), [1 << 61, -(1 << 61)], RANDOM.integers(-(1 << 61), 1 << 61, 99)])
DIVISORS = np.array([[0], [1], [-1], [2], [3], [-4], [7], [1 << 40], [1 << 61]])
NORMAL = (np.array(1 << 12), np.array(1 << 14), np.array(1 << 20))


def requantization(kind: str, rounding: str) -> Graph:
    graph = Graph(x=X)
    scalars = [np.array(number, kind) for number in KINDS[kind]]
    y = graph.op("Requantize", "x", MULTIPLIER, SHIFT, *scalars, domain="qgraph", rounding=rounding)
    return graph.gives(y)


def other(op_type: str, x: np.ndarray, *inputs: np.ndarray) -> Graph:
    graph = Graph(x=x)
    return graph.gives(graph.op(op_type, "x", *inputs, domain="qgraph"))


def cases() -> dict[str, tuple[Graph, np.ndarray]]:
    found = {}
    for kind, scalars in KINDS.items():
        for rounding in ROUNDINGS:
            wanted = requantize(X, MULTIPLIER, SHIFT, *(np.array(number, kind) for number in scalars), rounding)
            found[f"{kind}_{rounding.replace('-', '_')}"] = requantization(kind, rounding), wanted
    one, divisor = np.array(255, np.int32), np.array(137, np.int32)
    normal = integer_math.layer_normalize, integer_math.rms_normalize
    for name, graph, wanted in [
        ("sqrt", other("IntegerSqrt", SQUARES), integer_math.integer_sqrt(SQUARES)),
        ("divide", other("RoundedDivide", DIVIDENDS, DIVISORS), integer_math.rounded_divide(DIVIDENDS, DIVISORS)),
        ("table", other("TableInterpolate", WIDE, CURVE), integer_math.table_interpolate(WIDE, CURVE)),
        ("softmax", other("Softmax", SCORES, TABLE, divisor, one), integer_math.softmax(SCORES, TABLE, divisor, one)),
        ("layer_norm", other("LayerNormalize", SCORES, *NORMAL), normal[0](SCORES, *NORMAL)),
        ("rms_norm", other("RMSNormalize", SCORES, *NORMAL), normal[1](SCORES, *NORMAL)),
    ]:
        found[name] = graph, wanted
    return found


CASES = cases()


@pytest.fixture(scope="module", params=["plain", "sanitized"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Return all cases compiled; once so that undefined behaviour ends the process."""
    extra = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error") if request.param == "sanitized" else ()
    models = {name: graph.model for name, (graph, _) in CASES.items()}
    return Library(models, tmp_path_factory.mktemp("c"), (*FLAGS, *extra))


@needs_gcc
@pytest.mark.parametrize("name", CASES)
def test_c_follows_the_definition(library: Library, name: str):
    graph, wanted = CASES[name]
    (found,) = library.run(name, graph.feeds)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


def test_an_unknown_rounding_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="its rounding is 'up'"):
        emit_c(requantization("int8", "up").model, tmp_path)


def test_types_are_what_the_functions_say():
    assert all(graph.model.graph.outputs[0].dtype == ir.DataType.from_numpy(y.dtype) for graph, y in CASES.values())
