"""Sessions open what is valid, say in one line what is not, and random feeds follow their rules."""

import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.errors import UserError
from qgraph.runtime.session import TensorSpec, input_signature, open_session, output_signature, random_feeds


def model_bytes(text: str) -> bytes:
    return ir.to_proto(ir.from_onnx_text(text)).SerializeToString()


DOUBLE_RELU = """<ir_version: 10, opset_import: ["" : 20]>
g (float[n, 3] x, bool[n] keep) => (float[n, 3] y, bool[n] kept) {
    a = Relu(x)
    y = Relu(a)
    kept = Identity(keep)
}"""


def test_signatures_give_names_types_and_dynamic_axes():
    session = open_session(model_bytes(DOUBLE_RELU), threads=1)
    assert input_signature(session) == [TensorSpec("x", "float32", ["n", 3]), TensorSpec("keep", "bool", ["n"])]
    assert output_signature(session) == [TensorSpec("y", "float32", ["n", 3]), TensorSpec("kept", "bool", ["n"])]


def test_the_optimised_model_is_written_where_asked(tmp_path):
    open_session(model_bytes(DOUBLE_RELU), threads=1, optimised_path=tmp_path / "fused.onnx")
    assert qgraph.ir.load(tmp_path / "fused.onnx").graph.outputs[0].name == "y"
    open_session(model_bytes(DOUBLE_RELU), threads=1, optimise=False, optimised_path=tmp_path / "plain.onnx")
    assert sum(node.op_type == "Relu" for node in qgraph.ir.load(tmp_path / "plain.onnx").graph) == 2


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x0a"])
def test_what_is_no_model_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.onnx") as refused:
        open_session(path)
    assert "\n" not in str(refused.value)
    assert "ONNXRuntimeError" not in str(refused.value)


def test_the_runtime_writes_no_log_of_its_own(tmp_path):
    unknown, failing = tmp_path / "unknown.onnx", tmp_path / "failing.onnx"
    unknown.write_bytes(model_bytes(DOUBLE_RELU.replace("a = Relu(x)", "a = NoSuchOperator(x)")))
    failing.write_bytes(
        model_bytes(
            """<ir_version: 10, opset_import: ["" : 20]>
            g (float[n] x, int64[k] shape) => (float[a, b] y) { y = Reshape(x, shape) }"""
        )
    )
    code = """if True:
        import sys
        from pathlib import Path
        import numpy as np
        from qgraph.errors import UserError
        from qgraph.runtime.session import first_line, open_session
        try:
            open_session(Path(sys.argv[1]))
        except UserError as error:
            print(error)
        try:
            open_session(Path(sys.argv[2])).run(None, {"x": np.ones(3, np.float32), "shape": np.array([2, 2])})
        except Exception as error:
            print(first_line(error))
    """
    command = [sys.executable, "-c", code, str(unknown), str(failing)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    opened, ran = done.stdout.splitlines()
    assert "NoSuchOperator" in opened
    assert "Reshape" in ran


def test_without_the_runtime_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"qgraph-compiler\[cpu\]"):
        open_session(model_bytes(DOUBLE_RELU))


SIGNATURE = [
    TensorSpec("input_ids", "int64", ["batch", "seq"]),
    TensorSpec("attention_mask", "int64", ["batch", "seq"]),
    TensorSpec("token_type_ids", "int64", ["batch", "seq"]),
    TensorSpec("position_ids", "int64", ["batch", "seq"]),
    TensorSpec("pixels", "float16", ["batch", 3, None, None]),
    TensorSpec("use_cache", "bool", []),
]


def test_random_feeds_follow_names_types_and_shapes():
    feed, other = random_feeds(SIGNATURE, 7, count=2)
    assert {name: (array.shape, array.dtype.name) for name, array in feed.items()} == {
        "input_ids": ((1, 16), "int64"),
        "attention_mask": ((1, 16), "int64"),
        "token_type_ids": ((1, 16), "int64"),
        "position_ids": ((1, 16), "int64"),
        "pixels": ((1, 3, 16, 16), "float16"),
        "use_cache": ((), "bool"),
    }
    assert 0 <= feed["input_ids"].min() <= feed["input_ids"].max() < 8
    assert (feed["attention_mask"] == 1).all()
    assert (feed["token_type_ids"] == 0).all()
    assert feed["position_ids"].tolist() == [list(range(16))]
    assert bool(feed["use_cache"])
    assert (feed["pixels"] != other["pixels"]).any()


def test_random_feeds_repeat_with_the_seed():
    for one, other in zip(random_feeds(SIGNATURE, 7, count=2), random_feeds(SIGNATURE, 7, count=2), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_shape_given_for_one_input_settles_the_axes_of_the_others():
    (feed,) = random_feeds(SIGNATURE, 0, {"input_ids": (4, 9)})
    assert feed["attention_mask"].shape == (4, 9)
    assert feed["pixels"].shape == (4, 3, 16, 16)


def test_an_axis_that_is_named_as_a_sum_has_the_size_of_the_sum():
    decoder = [
        TensorSpec("input_ids", "int64", ["batch", "seq"]),
        TensorSpec("attention_mask", "int64", ["batch", "past + seq"]),
        TensorSpec("past_key_values.0.key", "float32", ["batch", 2, "past", 8]),
    ]
    (feed,) = random_feeds(decoder, 0, {"input_ids": (2, 1)})
    assert feed["attention_mask"].shape == (2, 17)
    assert feed["past_key_values.0.key"].shape == (2, 2, 16, 8)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"pixel": (1, 3, 8, 8)}, "no input 'pixel'"),
        ({"pixels": (1, 4, 8, 8)}, r"\[batch, 3, \?, \?\], which \[1, 4, 8, 8\]"),
        ({"pixels": (1, 3, 8)}, "does not fit"),
        ({"input_ids": (2, 9), "pixels": (3, 3, 8, 8)}, "does not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(UserError, match=message):
        random_feeds(SIGNATURE, 0, shapes)


def test_text_inputs_have_no_random_feed():
    with pytest.raises(UserError, match="'words' is string"):
        random_feeds([TensorSpec("words", "string", [1])], 0)
