"""How a provider's parts are cut."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qgraph.analysis.partitions import partitions

BRANCH = """{
    a = Abs (x)
    y = If (c) <then_branch = t () => (float[2] p) { p = Neg (a) }, else_branch = e () => (float[2] q) { q = Exp (x) }>
}"""


def graph(text: str) -> ir.Graph:
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[2] x, bool c) => (float[2] y) {text}'
    ).graph


def cut(text: str, *refused: str) -> tuple[list[list[str]], list[str]]:
    """Return the outputs' names of the nodes of each part, and of those that cut."""
    found = graph(text)
    parts = partitions(found, [node for node in found if node.op_type in refused])
    assert [node.op_type for node in parts.left] == [node.op_type for node in found if node.op_type in refused]
    return [[str(node.outputs[0].name) for node in part] for part in parts.parts], [
        str(node.outputs[0].name) for node in parts.cuts
    ]


@pytest.mark.parametrize(
    ("text", "parts", "cuts"),
    [
        ("{ a = Abs (x) b = Neg (a) y = Exp (b) }", [["a", "b", "y"]], []),
        ("{ a = Abs (x) b = Erf (a) y = Exp (b) }", [["a"], ["y"]], ["b"]),
        # At the start and at the end nothing is cut.
        ("{ a = Erf (x) y = Exp (a) }", [["y"]], []),
        ("{ a = Exp (x) y = Erf (a) }", [["a"]], ["y"]),
        # A branch beside the refused node goes on in the same part.
        ("{ a = Abs (x) b = Erf (a) c1 = Exp (a) d = Neg (c1) y = Add (b, d) }", [["a", "c1", "d"], ["y"]], ["b"]),
        # What reads only from refused nodes and inputs waits for no part.
        ("{ a = Erf (x) b = Erf (a) c1 = Abs (x) y = Add (b, c1) }", [["c1", "y"]], []),
        # Two refused nodes one behind the other are one cut.
        ("{ a = Abs (x) b = Erf (a) d = Erf (b) y = Exp (d) }", [["a"], ["y"]], ["b"]),
        # What a subgraph reads, its node reads.
        (BRANCH, [["a"]], ["y"]),
    ],
)  # fmt: skip
def test_parts_are_as_few_as_onnx_runtime_makes_them(text: str, parts: list[list[str]], cuts: list[str]):
    assert cut(text, "Erf", "If") == (parts, cuts)
