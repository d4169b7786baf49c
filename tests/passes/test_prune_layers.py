"""`prune-layers`: which blocks of a repeated network go, and when none does."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.errors import UserError
from qgraph.models import pydoc_decoder
from qgraph.passes import PruneLayers
from qgraph.pipeline import Feeds, Pipeline

WIDTH = 16


def network(blocks: int = 6, *, idle: tuple[int, ...] = (), outputs: bool = False, seed: int = 0) -> ir.Model:
    """Return a chain x + W2 relu(W1 norm(x)); the blocks in `idle` do next to nothing."""
    random = np.random.default_rng(seed)
    nodes, constants, x, extra = [], [], "x0", []
    for number in range(blocks):
        scale = 1e-3 if number in idle else 1.0
        arrays = {
            f"g{number}": np.ones(WIDTH),
            f"u{number}": random.normal(size=(WIDTH, 32)) / 4,
            f"d{number}": scale * random.normal(size=(32, WIDTH)) / 4,
        }
        constants += [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
        steps = [
            ("LayerNormalization", [x, f"g{number}"], f"n{number}"),
            ("MatMul", [f"n{number}", f"u{number}"], f"h{number}"),
            ("Relu", [f"h{number}"], f"r{number}"),
            ("MatMul", [f"r{number}", f"d{number}"], f"o{number}"),
            ("Add", [x, f"o{number}"], f"x{number + 1}"),
        ]
        nodes += [onnx.helper.make_node(op, inputs, [name], name=name) for op, inputs, name in steps]
        x = f"x{number + 1}"
        extra += [f"h{number}"] * outputs
    infos = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 32 if name[0] == "h" else WIDTH])
        for name in (x, *extra)
    ]
    given = onnx.helper.make_tensor_value_info("x0", onnx.TensorProto.FLOAT, ["n", WIDTH])
    graph = onnx.helper.make_graph(nodes, "g", [given], infos, constants)
    opset = [onnx.helper.make_opsetid("", 20)]
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9))


def samples(count: int = 4, seed: int = 1) -> list[Feeds]:
    random = np.random.default_rng(seed)
    return [{"x0": random.normal(size=(8, WIDTH)).astype(np.float32)} for _ in range(count)]


def run(model: ir.Model, feeds: list[Feeds]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in feeds])


def products(model: ir.Model) -> int:
    return sum(node.op_type == "MatMul" for node in model.graph)


@pytest.mark.parametrize("importance", ["output", "activation"])
def test_blocks_that_do_nothing_go(importance: str):
    model = network(idle=(2, 3))
    exact = run(model, samples(seed=7))

    report = Pipeline([PruneLayers(keep=3, importance=importance)]).run(model, calibration=samples())

    assert set(report.parts[0].figures["removed"]) >= {2, 3}
    assert products(model) == 6
    assert qgraph.ir.check(model) is None
    assert len(run(model, samples(seed=7))) == len(exact)


def test_what_is_removed_is_as_if_it_had_done_nothing():
    model = network(idle=(1, 2, 3, 4))
    exact = run(model, samples(seed=7))

    report = Pipeline([PruneLayers(ratio=0.4)]).run(model, calibration=samples())

    assert report.changed == 2
    assert products(model) == 8
    np.testing.assert_allclose(run(model, samples(seed=7)), exact, atol=0.02)


def test_the_last_block_may_go_and_the_output_keeps_its_name():
    model = network(3, idle=(0, 1, 2))
    names = [(value.name, value.shape) for value in model.graph.outputs]

    for number in range(2):
        copy = model.clone()
        kept = tuple(one for one in range(4) if one != number)
        Pipeline([PruneLayers(ratio=0.3, exclude=kept, importance="random")]).run(copy)
        assert [(value.name, value.shape) for value in copy.graph.outputs] == names
        assert run(copy, samples()).shape == run(model, samples()).shape


def test_a_shipped_decoder_runs_with_fewer_layers():
    model = pydoc_decoder.build()
    ids = pydoc_decoder.dataset().calibration["input_ids"][:2]
    before = products(model)

    report = Pipeline([PruneLayers(ratio=0.25)]).run(model, calibration=[{"input_ids": ids}])

    assert report.changed >= 1
    assert products(model) < before


def test_blocks_that_make_outputs_stay():
    model = network(outputs=True)

    report = Pipeline([PruneLayers()]).run(model, calibration=samples())

    assert report.changed == 0


def test_a_graph_that_repeats_nothing_is_left_alone():
    text = '<ir_version: 9, opset_import: ["" : 20]> g (float[n,4] x) => (float[n,4] y) { y = Relu (x) }'

    assert Pipeline([PruneLayers()]).run(ir.from_onnx_text(text)).changed == 0


@pytest.mark.parametrize("options", ["ratio=0", "ratio=1.0", "keep=-1"])
def test_options_out_of_range_are_refused(options: str):
    with pytest.raises(UserError, match="prune-layers"):
        Pipeline.parse(f"prune-layers{{{options}}}")


def test_data_are_needed_to_tell_what_matters():
    with pytest.raises(UserError, match="'prune-layers' needs calibration data"):
        Pipeline([PruneLayers()]).run(network())
