"""Pieces of a segment: every node once, in order, and what crosses is read and given."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qgraph.analysis.blocks import Segment
from qgraph.analysis.segment_cuts import divided


def chain(convolutions: int) -> tuple[ir.Model, Segment]:
    """Return a chain of convolutions with sums around every second one."""
    lines, value = [], "x"
    for number in range(convolutions):
        lines.append(f"c{number} = Conv ({value}, w)")
        lines.append(f"r{number} = Relu (c{number})")
        value = f"r{number}"
        if number % 2:
            lines.append(f"s{number} = Add (r{number}, {value})")
            value = f"s{number}"
    lines.append(f"y = Identity ({value})")
    body = "\n".join(lines)
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]>\n'
        f"g (float[1, 4, 5, 5] x, float[4, 4, 1, 1] w) => (float[1, 4, 5, 5] y)\n{{\n{body}\n}}"
    )
    nodes = list(model.graph)
    return model, Segment(nodes, [model.graph.inputs[0]], [nodes[-1].outputs[0]], None, 64)


@pytest.mark.parametrize("count", [1, 4, 5, 11, 24])
def test_pieces_are_the_segment(count: int) -> None:
    _, whole = chain(count)
    layers = [node for node in whole.nodes if node.op_type == "Conv"]
    pieces = divided(whole, layers)
    assert [node for piece in pieces for node in piece.nodes] == list(whole.nodes)
    known = set(whole.reads)
    for number, piece in enumerate(pieces):
        made = {value for node in piece.nodes for value in node.outputs}
        assert set(piece.reads) <= known
        needed = {value for node in piece.nodes for value in node.inputs} - made
        assert needed <= {*piece.reads, whole.nodes[0].inputs[1]}
        later = {value for one in pieces[number + 1 :] for value in one.reads} | set(whole.gives)
        assert set(piece.gives) == made & later
        assert 0 < sum(node in layers for node in piece.nodes) <= 4
        known |= set(piece.gives)
    assert len(pieces) <= 1 + count // 2


def test_a_repeated_block_stays_whole() -> None:
    _, whole = chain(12)
    block = Segment(whole.nodes, whole.reads, whole.gives, 0, 64)
    assert divided(block, list(whole.nodes)) == [block]
