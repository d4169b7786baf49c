"""What holds for every reference model: the graph is valid, repeatable, and says what the torch model said."""

import re
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph import models
from qgraph.errors import UserError
from qgraph.models import __main__ as command
from qgraph.models import checkpoint, data

LARGEST_CHECKPOINT = 8_000_000
PARAMETERS = {
    "digits_cnn": 1_315_402,
    "digits_encoder": 1_176_538,
    "digits_mobilenet": 151_938,
    "pydoc_decoder": 4_000_000,
}
BATCH_STATISTICS = {"digits_cnn": 7_552, "digits_mobilenet": 3_776}  # running means and variances
SIGNATURES = {
    "digits_cnn": (("image", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8]), ["batch", 10]),
    "digits_encoder": (("image", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8]), ["batch", 10]),
    "digits_mobilenet": (("image", onnx.TensorProto.FLOAT, ["batch", 1, 8, 8]), ["batch", 10]),
    "pydoc_decoder": (("input_ids", onnx.TensorProto.INT64, ["batch", "seq"]), ["batch", "seq", 256]),
}

every_model = pytest.mark.parametrize("name", models.names())


def test_names_are_the_four_models():
    assert models.names() == ("digits_cnn", "digits_encoder", "digits_mobilenet", "pydoc_decoder")


@every_model
def test_graph_passes_the_full_check(proto, name):
    model = proto(name)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 10
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]


@every_model
def test_signature(proto, name):
    (given,), (result,) = proto(name).graph.input, proto(name).graph.output
    wanted_input, wanted_output = SIGNATURES[name]
    assert (given.name, given.type.tensor_type.elem_type, _dimensions(given)) == wanted_input
    assert (result.name, result.type.tensor_type.elem_type) == ("logits", onnx.TensorProto.FLOAT)
    assert _dimensions(result) == wanted_output


@every_model
def test_two_builds_are_the_same_bytes(name):
    first, second = (ir.to_proto(models.build(name)).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@every_model
def test_nodes_are_named_once_and_after_their_operator(proto, name):
    nodes = proto(name).graph.node
    assert max(Counter(node.name for node in nodes).values()) == 1
    assert all(re.search(rf"/{node.op_type}(_\d+)?$", node.name) for node in nodes)


@every_model
def test_every_initializer_is_used(proto, name):
    graph = proto(name).graph
    used = {value for node in graph.node for value in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


@every_model
def test_checkpoint_is_small_and_complete(proto, name):
    assert checkpoint.path(name).stat().st_size <= LARGEST_CHECKPOINT
    stored = checkpoint.load(name).parameters
    assert sum(array.size for array in stored.values()) == PARAMETERS[name] + BATCH_STATISTICS.get(name, 0)
    assert stored.keys() <= {tensor.name for tensor in proto(name).graph.initializer}


@every_model
def test_onnx_agrees_with_what_torch_answered(run, name):
    stored = checkpoint.load(name)
    logits = run(name, stored.reference_input)
    assert np.abs(stored.reference_logits).max() > 1
    np.testing.assert_allclose(logits, stored.reference_logits, rtol=0, atol=1e-4)


@every_model
def test_batch_is_dynamic(run, name):
    samples = next(iter(models.dataset(name).evaluation.values()))[:3]
    together = run(name, samples)
    one_by_one = np.concatenate([run(name, sample[None]) for sample in samples])
    np.testing.assert_allclose(together, one_by_one, rtol=0, atol=1e-4)


@every_model
def test_dataset_fits_the_model(proto, name):
    (given,) = proto(name).graph.input
    dataset = models.dataset(name)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(given.type.tensor_type.elem_type)
    for arrays in (dataset.calibration, dataset.evaluation):
        assert list(arrays) == [given.name]
        assert arrays[given.name].dtype == dtype
    calibration, evaluation = dataset.calibration[given.name], dataset.evaluation[given.name]
    assert len(calibration) == 200
    assert len(evaluation) == len(dataset.labels) >= 100
    assert dataset.labels.dtype == np.int64
    seen = {sample.tobytes() for sample in calibration}
    assert not any(sample.tobytes() in seen for sample in evaluation)


@every_model
def test_each_model_has_a_card_and_a_training_script(name):
    folder = checkpoint.path(name).parent
    card = (folder / f"{name}.md").read_text(encoding="utf-8")
    assert f"python -m qgraph.models.train_{name}" in card
    assert (folder / f"train_{name}.py").is_file()


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"no reference model 'digit_cnn'.*Did you mean 'digits_cnn'"):
        models.build("digit_cnn")
    with pytest.raises(UserError, match="no reference model 'x'"):
        models.dataset("x")


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut off", b"no archive"])
def test_a_broken_checkpoint_is_named(tmp_path, monkeypatch, content):
    file = tmp_path / "digits_cnn.npz"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(checkpoint, "path", lambda name: tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*digits_cnn\.npz"):
        models.build("digits_cnn")


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    data._all_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"qgraph-compiler\[demo\]"):
        models.dataset("digits_cnn")


def test_building_needs_neither_torch_nor_scikit_learn():
    code = (
        "import sys; from qgraph import models; [models.build(name) for name in models.names()]; "
        "sys.exit(bool({'torch', 'sklearn'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@every_model
def test_command_writes_model_and_data(tmp_path, capsys, proto, name):
    assert command.main([name, "-o", str(tmp_path / "new" / "folder")]) == 0
    files = [tmp_path / "new" / "folder" / f"{name}{end}" for end in (".onnx", "_calib.npz", "_heldout.npz")]
    assert capsys.readouterr().out.splitlines() == [str(file) for file in files]
    written = onnx.load(files[0])
    onnx.checker.check_model(written, full_check=True)
    assert not written.graph.value_info
    assert (written.graph.node, written.graph.initializer) == (proto(name).graph.node, proto(name).graph.initializer)
    dataset = models.dataset(name)
    with np.load(files[1]) as calibration, np.load(files[2]) as held_out:
        assert calibration.files == list(dataset.calibration)
        assert held_out.files == [*dataset.evaluation, "labels"]
        np.testing.assert_array_equal(held_out["labels"], dataset.labels)


def test_command_repeats_to_the_byte(tmp_path):
    for folder in ("a", "b"):
        command.export("digits_cnn", tmp_path / folder)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits_cn"], r"error: there is no reference model 'digits_cn' .* Did you mean 'digits_cnn'\?"),
        (["digits_cnn", "-o", "{tmp}/file"], r"error: cannot write to .*/file: .*: choose another with -o"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("in the way")
    assert command.main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(message, printed.err.rstrip("\n"))


def _dimensions(value):
    return [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
