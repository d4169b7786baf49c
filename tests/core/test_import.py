"""Loading what exporters write and what breaks on the way, and saving it whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import qgraph.ir
from qgraph.errors import UserError

RANDOM = np.random.default_rng(0)


def value(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def linear(weight: np.ndarray, **fields: object) -> onnx.ModelProto:
    """Return y = MatMul(x, w)."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [value("x", ["n", weight.shape[0]])],
        [value("y", ["n", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, **fields)


WEIGHT = RANDOM.normal(size=(32, 48)).astype(np.float32)


def weight_of(model: ir.Model, name: str = "w") -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    onnx.save(linear(WEIGHT), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        qgraph.ir.load(path)
    message = str(caught.value)
    assert "\n" not in message, message
    return message


# --- files that are no models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"hello, this is not a model", "not a"),
        (bytes(range(256)) * 40, "not a"),
        (b"\x00" * 5000, "not a"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "git lfs pull"),
        (b"\x08\x08", "no graph"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert words in refusal(path)


@pytest.mark.parametrize("suffix", [".onnxtxt", ".textproto", ".json"])
def test_text_that_is_no_model_is_refused(tmp_path: Path, suffix: str):
    path = tmp_path / f"m{suffix}"
    path.write_text("graph { node { op_type: 3 } } <<<", encoding="utf-8")
    assert "not a valid ONNX model" in refusal(path)


def test_text_is_read(tmp_path: Path):
    path = tmp_path / "m.onnxtxt"
    path.write_text('<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Abs(x) }', "utf-8")
    assert [node.op_type for node in qgraph.ir.load(path).graph] == ["Abs"]


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    assert "does not exist" in refusal(tmp_path / "no.onnx")
    assert "is a folder" in refusal(tmp_path)


def test_every_truncation_is_refused(saved: Path):
    whole = saved.read_bytes()
    for length in [*range(1, 200, 7), *range(200, len(whole), 997), len(whole) - 1]:
        saved.write_bytes(whole[:length])
        refusal(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "ir_version", 2), "IR version 2"),
        (lambda m: setattr(m, "ir_version", 99), "upgrade onnx"),
        (lambda m: setattr(m.opset_import[0], "version", 999), "opset 999"),
        (lambda m: m.graph.node[0].input.__setitem__(0, "nowhere"), "reads 'nowhere', which nothing before it defines"),
        (lambda m: m.graph.node[0].input.__setitem__(0, "y"), "cycle"),
        (lambda m: m.graph.node.append(m.graph.node[0]), "'y' is redeclared"),
        (lambda m: m.graph.initializer.append(m.graph.initializer[0]), "'w' is there twice"),
        (lambda m: setattr(m.graph.output[0], "name", "z"), "'z' is not produced"),
        (lambda m: setattr(m.graph.node[0], "domain", "my.own"), "does not import"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 33), "33"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, -32), "negative"),
        (lambda m: m.graph.initializer[0].dims.__setitem__(0, 1 << 62), "needs"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 77), "not a valid"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.STRING), "text"),
    ],
)
def test_inconsistent_models_are_refused(saved: Path, change, words: str):
    model = onnx.load(saved)
    change(model)
    saved.write_bytes(model.SerializeToString())
    assert words in refusal(saved)


def test_sparse_initializers_and_maps_are_refused_in_words(tmp_path: Path):
    model = linear(WEIGHT)
    values, indices = numpy_helper.from_array(np.ones(2, np.float32), "s"), numpy_helper.from_array(np.array([1, 2]))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [9]))
    onnx.save(model, tmp_path / "sparse.onnx")
    assert "'s' is stored sparse" in refusal(tmp_path / "sparse.onnx")
    model = linear(WEIGHT)
    map_type = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    model.graph.output.append(helper.make_value_info("z", map_type))
    onnx.save(model, tmp_path / "map.onnx")
    assert "ZipMap" in refusal(tmp_path / "map.onnx")


# --- external data ---------------------------------------------------------------------------------------------------


def external(path: Path, location: str, **fields: int) -> None:
    """Save the linear model with its weight said to lie at `location`."""
    model = linear(WEIGHT)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, **fields}.items():
        tensor.external_data.add(key=key, value=str(text))
    path.write_bytes(model.SerializeToString())


def test_external_data_are_read_where_they_lie(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(b"\0" * 64 + WEIGHT.tobytes())
    external(tmp_path / "m.onnx", "sub/w.bin", offset=64, length=WEIGHT.nbytes)
    model = qgraph.ir.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(weight_of(model), WEIGHT)
    assert qgraph.ir.data_files(model) == [tmp_path / "sub" / "w.bin"]


@pytest.mark.parametrize(
    ("location", "fields", "words"),
    [
        ("w.bin", {}, "is missing: copy it to"),
        ("", {}, "not in which"),
        ("../w.bin", {}, "outside the model's folder"),
        ("a/../../w.bin", {}, "outside the model's folder"),
        ("/etc/passwd", {}, "outside the model's folder"),
        ("C:\\w.bin", {}, "outside the model's folder"),
        ("short.bin", {}, "cut off"),
        ("whole.bin", {"offset": 8}, "cut off"),
        ("whole.bin", {"offset": -8}, "must be non-negative"),
        ("whole.bin", {"length": 12}, "needs"),
        ("link.bin", {}, "a link that leads outside"),
        ("folder", {}, "is missing"),
    ],
)
def test_bad_external_data_are_refused(tmp_path: Path, location: str, fields: dict[str, int], words: str):
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    (folder / "short.bin").write_bytes(WEIGHT.tobytes()[:-4])
    (folder / "whole.bin").write_bytes(WEIGHT.tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    external(folder / "m.onnx", location, **fields)
    message = refusal(folder / "m.onnx")
    assert words in message
    assert "'w'" in message


def test_a_link_within_the_folder_is_followed(tmp_path: Path):
    (tmp_path / "whole.bin").write_bytes(WEIGHT.tobytes())
    (tmp_path / "w.bin").symlink_to("whole.bin")
    external(tmp_path / "m.onnx", "w.bin")
    np.testing.assert_array_equal(weight_of(qgraph.ir.load(tmp_path / "m.onnx")), WEIGHT)


# --- what exporters write --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ir_version", [3, 4, 6, 8, 10])
def test_initializers_that_are_inputs_too(tmp_path: Path, ir_version: int):
    model = linear(WEIGHT)
    model.ir_version = ir_version
    model.graph.input.append(value("w", [32, 48]))
    onnx.save(model, tmp_path / "m.onnx")
    loaded = qgraph.ir.load(tmp_path / "m.onnx")
    assert [v.name for v in loaded.graph.inputs] == ["x", "w"]
    assert qgraph.ir.constant(loaded.graph.initializers["w"]) is None, "a caller may override it"


@pytest.mark.parametrize(
    "array",
    [
        RANDOM.normal(size=(40, 40)).astype(np.float16),
        RANDOM.integers(-128, 127, size=(40, 40)).astype(np.int8),
        RANDOM.normal(size=(40, 40)) > 0,
        RANDOM.normal(size=(0, 40)).astype(np.float32),
        RANDOM.normal(size=()).astype(np.float32),
        np.array([["a", "bc"]], dtype=object),
    ],
    ids=str,
)
def test_weights_of_every_kind_survive(tmp_path: Path, array: np.ndarray):
    tensor = numpy_helper.from_array(array, "w")
    output = value("y", list(array.shape), tensor.data_type)
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], [tensor])
    onnx.save(helper.make_model(graph, ir_version=8), tmp_path / "m.onnx")
    model = qgraph.ir.load(tmp_path / "m.onnx")
    for external_above in (0, 1 << 30):
        qgraph.ir.save(model, tmp_path / "again.onnx", external_above=external_above)
        after = onnx.load(tmp_path / "again.onnx")
        assert after.graph.initializer[0].data_type == tensor.data_type
        np.testing.assert_array_equal(numpy_helper.to_array(after.graph.initializer[0]), numpy_helper.to_array(tensor))


def test_four_bit_weights_survive(tmp_path: Path):
    packed = RANDOM.integers(0, 255, size=2000).astype(np.uint8)
    tensor = helper.make_tensor("w", TensorProto.INT4, [40, 100], packed.tobytes(), raw=True)
    output = value("y", [40, 100], TensorProto.INT4)
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], [tensor])
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "m.onnx")
    model = qgraph.ir.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(weight_of(model).astype(np.int8), numpy_helper.to_array(tensor).astype(np.int8))
    qgraph.ir.save(model, tmp_path / "again.onnx")
    assert onnx.load(tmp_path / "again.onnx").graph.initializer[0].raw_data == packed.tobytes()


def test_weights_in_typed_fields_and_in_constants(tmp_path: Path):
    floats = helper.make_tensor("w", TensorProto.FLOAT, [32, 48], WEIGHT.reshape(-1).tolist())
    model = linear(WEIGHT)
    model.graph.initializer[0].CopyFrom(floats)
    onnx.save(model, tmp_path / "m.onnx")
    np.testing.assert_array_equal(weight_of(qgraph.ir.load(tmp_path / "m.onnx")), WEIGHT)
    model = linear(WEIGHT)
    del model.graph.initializer[:]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(WEIGHT)))
    onnx.save(model, tmp_path / "c.onnx")
    loaded = qgraph.ir.load(tmp_path / "c.onnx")
    np.testing.assert_array_equal(qgraph.ir.constant(loaded.graph[0].outputs[0]), WEIGHT)


def test_nodes_out_of_order_are_sorted(tmp_path: Path):
    model = linear(WEIGHT)
    model.graph.node.insert(0, helper.make_node("Relu", ["y"], ["z"]))
    model.graph.output[0].name = "z"
    onnx.save(model, tmp_path / "m.onnx")
    assert [node.op_type for node in qgraph.ir.load(tmp_path / "m.onnx").graph] == ["MatMul", "Relu"]


def test_names_that_hide_others_are_changed(tmp_path: Path):
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x, bool c) => (float[2] y) {
        h = Abs(x)
        y = If (c) <then_branch = t () => (float[2] o) { h = Neg(x) o = Add(h, h) },
                    else_branch = e () => (float[2] o) { o = Identity(h) }>
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    model = qgraph.ir.load(tmp_path / "m.onnx")
    names = [output.name for node in qgraph.ir.walk(model) for output in node.outputs]
    assert names.count("h") == 1
    assert names.count("o") == 2, "branches may share names"


def test_a_resize_of_opset_11_without_roi_is_read(tmp_path: Path):
    text = """<ir_version: 6, opset_import: ["" : 11]>
    g (float[1,1,2,2] x) => (float[1,1,4,4] y) <float[4] s = {1.0,1.0,2.0,2.0}> { y = Resize (x, , s) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    assert qgraph.ir.load(tmp_path / "m.onnx").graph[0].inputs[1] is None


def test_functions_optional_and_sequence_types_are_kept(tmp_path: Path):
    text = """<ir_version: 9, opset_import: ["" : 17, "my" : 1]>
    g (float[2] x) => (seq(float[2]) s, float[2] y) { s = SequenceConstruct(x, x) y = my.f(x) }
    <domain: "my", opset_import: ["" : 17]> f (a) => (b) { b = Abs(a) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    model = qgraph.ir.load(tmp_path / "m.onnx")
    qgraph.ir.save(model, tmp_path / "again.onnx")
    again = onnx.load(tmp_path / "again.onnx")
    assert [function.name for function in again.functions] == ["f"]
    assert again.graph.output[0].type.HasField("sequence_type")


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("external_above", [0, 1 << 30])
def test_saving_over_the_source_and_twice_gives_the_same_bytes(saved: Path, external_above: int):
    for _ in range(2):
        qgraph.ir.save(qgraph.ir.load(saved), saved, external_above=external_above)
    first = {path.name: path.read_bytes() for path in saved.parent.iterdir()}
    qgraph.ir.save(qgraph.ir.load(saved), saved, external_above=external_above)
    assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == first
    assert ("m.onnx.data" in first) == (external_above == 0)
    onnx.checker.check_model(saved)
    np.testing.assert_array_equal(numpy_helper.to_array(onnx.load(saved).graph.initializer[0]), WEIGHT)


def test_a_failure_while_writing_leaves_nothing_behind(saved: Path):
    before = saved.read_bytes()
    model = qgraph.ir.load(saved)

    def broken() -> np.ndarray:
        raise OSError(28, "No space left on device")

    model.graph.initializers["w"].const_value = qgraph.ir.lazy(broken, ir.DataType.FLOAT, [32, 48])
    for external_above in (0, 1 << 30):
        with pytest.raises(UserError, match="cannot be written: No space left on device"):
            qgraph.ir.save(model, saved, external_above=external_above)
    assert [path.name for path in saved.parent.iterdir()] == ["m.onnx"]
    assert saved.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_named(saved: Path):
    model = qgraph.ir.load(saved)
    with pytest.raises(UserError, match="cannot be written"):
        qgraph.ir.save(model, saved.parent / "no" / "m.onnx")
    with pytest.raises(UserError, match="cannot be written"):
        qgraph.ir.save(model, saved.parent)


def test_a_full_disk_is_told(saved: Path):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    code = (
        "import resource, sys, qgraph.ir\n"
        "from qgraph.errors import UserError\n"
        f"model = qgraph.ir.load({str(saved)!r})\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
        "try:\n"
        f"    qgraph.ir.save(model, {str(saved.parent / 'out.onnx')!r})\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "out.onnx cannot be written: File too large" in done.stdout
    assert sorted(path.name for path in saved.parent.iterdir()) == ["m.onnx"]


def test_a_tensor_that_is_not_as_large_as_it_says_is_a_fault(saved: Path):
    model = qgraph.ir.load(saved)
    lie = qgraph.ir.lazy(lambda: np.zeros(7, np.float32), ir.DataType.FLOAT, [32, 48])
    model.graph.initializers["w"].const_value = lie
    with pytest.raises(ValueError, match="announced 6144 bytes and has 28"):
        qgraph.ir.save(model, saved)


def test_memory_follows_the_largest_tensor(tmp_path: Path):
    """Rewriting 240 MB of weights, 8 MB each, must not hold more than a few of them."""
    graph = onnx.GraphProto(name="g")
    big = np.ones((1024, 2048), np.float32)
    for index in range(30):
        graph.initializer.append(numpy_helper.from_array(big, f"w{index}"))
    graph.node.append(helper.make_node("Sum", [f"w{index}" for index in range(30)], ["y"]))
    graph.output.append(value("y", [1024, 2048]))
    onnx.save(helper.make_model(graph, ir_version=8), tmp_path / "m.onnx")
    code = (
        "import resource, numpy as np, qgraph.ir\n"
        f"model = qgraph.ir.load({str(tmp_path / 'm.onnx')!r})\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for value in model.graph.initializers.values():\n"
        "    source = value.const_value\n"
        "    half = lambda source=source: source.numpy().astype(np.float16)\n"
        "    value.const_value = qgraph.ir.lazy(half, __import__('onnx_ir').DataType.FLOAT16, [1024, 2048])\n"
        f"qgraph.ir.save(model, {str(tmp_path / 'half.onnx')!r})\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60, f"{done.stdout} MB more while saving"
    assert os.path.getsize(tmp_path / "half.onnx") == pytest.approx(30 * 4 * 2**20, rel=0.01)  # noqa: PTH202
