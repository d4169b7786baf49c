"""Every adapter against ONNX Runtime, which runs the model as it was and as it is after."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx.defs
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.errors import UserError
from qgraph.passes import ConvertOpset
from qgraph.passes._opset_adapters import ADAPTERS
from qgraph.pipeline import Pipeline

LATEST_OF_RUNTIME = 23


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def model_of(text: str, opset: int, ir_version: int = 4) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n{text}')


IMAGE = np.random.default_rng(0).normal(size=(2, 4, 6, 6)).astype(np.float32)


def cases() -> dict[str, tuple[int, str]]:
    """Return name -> (opset, graph) of the models in the golden file, where they stand as `--- name opset`."""
    path = Path(__file__).parent.parent / "golden/convert-opset/adapters.txt"
    blocks = path.read_text(encoding="utf-8").split("--- ")[1:]
    heads = [(*block.partition("\n")[0].split(), block.partition("\n")[2]) for block in blocks]
    return {name: (int(opset), text) for name, opset, text in heads}


CASES = cases()


def group_norm(array: np.ndarray) -> list[np.ndarray]:
    """Compute the case "group-norm" in numpy: one scale and bias for each of two groups."""
    scale, bias = np.repeat([1.5, 2.5], 2), np.repeat([0.5, -0.5], 2)
    groups = array.reshape(2, 2, -1)
    normal = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    return [normal.reshape(array.shape) * scale[:, None, None] + bias[:, None, None]]


@pytest.mark.parametrize("version", [13, 18, 21, LATEST_OF_RUNTIME])
@pytest.mark.parametrize("name", CASES)
def test_the_same_is_computed_after(name: str, version: int):
    opset, text = CASES[name]
    array = IMAGE.reshape(12, 24) if "12,24] x" in text else IMAGE
    array = array.astype(np.float16) if "float16" in text else array
    if name == "roi-align" and version > 21:
        pytest.skip("the runtime has no kernel for RoiAlign of opset 22")
    feeds = {"x": array} | ({"c": np.ones((), dtype=bool)} if "bool c" in text else {})
    model = model_of(text, opset)
    if name == "group-norm" and version < 21:
        pytest.skip("the runtime has no kernel for GroupNormalization before opset 21")
    expected = group_norm(array) if name == "group-norm" else run(model, feeds)

    Pipeline([ConvertOpset(version=version)]).run(model)

    assert model.graph.opset_imports[""] == max(opset, version)
    onnx.checker.check_model(ir.to_proto(model))
    for one, other in zip(expected, run(model, feeds), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-6)


def test_a_second_run_changes_nothing():
    model = model_of(CASES["softmax-inner"][1], 7)
    Pipeline([ConvertOpset(version=21)]).run(model)
    assert Pipeline([ConvertOpset(version=21)]).run(model).changed == 0


def test_a_later_opset_stays():
    model = model_of("g (float[2] x) => (float[2] y) { y = Abs(x) }", 22)
    report = Pipeline([ConvertOpset(version=21)]).run(model)
    assert (report.changed, model.graph.opset_imports[""], report.notes) == (0, 22, ("opset 22 stays",))


@pytest.mark.parametrize(
    ("opset", "text", "words"),
    [
        (6, "g (float[2] x) => (float[2] y) { y = Abs(x) }", "opset 6, and conversion starts at 7"),
        (8, "g (float[2] x) => (float[2] y) { y = ImageScaler(x) }", r"ImageScaler.*no such operator"),
        (
            7,
            "g (float[2,4] x, float[4] s) => (float[2,4] y) { y = BatchNormalization <spatial = 0> (x, s, s, s, s) }",
            "spatial=0",
        ),
        (7, "g (float[2,4] x) => (float[2,4] m) { y, m = Dropout(x) }", "mask is read"),
        (
            10,
            "g (float[1,1,4,4] x, float[4] s) => (float[1,1,a,b] y) { y = Resize <mode = \"nearest\"> (x, s) }",
            "scales are computed",
        ),
        (
            10,
            'g (float[1,1,4,4] x) => (float[1,1,2,8] y) <float[4] s = {1.0,1.0,0.5,2.0}> { y = Resize(x, s) }',
            "shrinks along another",
        ),
        (
            7,
            "g (float[2,4] x, float[4] s) => (float[4] m) { y, m, v, a, b = BatchNormalization(x, s, s, s, s) }",
            "training mode",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named(opset: int, text: str, words: str):
    with pytest.raises(UserError, match=words) as caught:
        Pipeline([ConvertOpset()]).run(model_of(text, opset))
    assert "\n" not in str(caught.value)


def test_versions_out_of_range_are_refused():
    with pytest.raises(UserError, match="must be from 13"):
        Pipeline.parse("convert-opset{version=9}")


# fmt: off
COMPATIBLE = {
    # Attributes and inputs that were added with a default that means what was meant before.
    "ArgMax", "ArgMin", "Attention", "AveragePool", "Cast", "CastLike", "Constant", "DepthToSpace", "DequantizeLinear",
    "GRU", "GatherND", "Gemm", "LSTM", "LpPool", "MaxPool", "OptionalHasElement", "QuantizeLinear", "RNN", "Range",
    "Reshape", "ScatterElements", "ScatterND", "Shape", "SpaceToDepth",
    # Types that were taken away, which the runtime never computed.
    "Erf",
}
# fmt: on


def test_no_change_of_a_definition_is_without_an_adapter():
    """Read the changes off onnx's own schemas: what they alter has an adapter for that version, or is compatible."""
    versions: dict[str, list[onnx.defs.OpSchema]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= 25:
            versions.setdefault(schema.name, []).append(schema)
    missing = []
    for name, schemas in versions.items():
        ordered = sorted(schemas, key=lambda schema: schema.since_version)
        for before, after in itertools.pairwise(ordered):
            if after.since_version <= 7 or not _differs(before, after):
                continue
            steps = {step for step, _ in ADAPTERS.get(name, ())}
            if name not in COMPATIBLE and after.since_version not in steps | _HARMLESS.get(name, set()):
                missing.append(f"{name} {after.since_version}")
    assert missing == []


_HARMLESS = {"Dropout": {10}, "Pad": {18}, "Resize": {13, 18}, "TopK": {11}, "GroupNormalization": set()}


def _differs(before: onnx.defs.OpSchema, after: onnx.defs.OpSchema) -> bool:
    defaults = [{name: str(a.default_value) for name, a in schema.attributes.items()} for schema in (before, after)]
    options = [[str(one.option) for one in [*schema.inputs, *schema.outputs]] for schema in (before, after)]
    types = [{one.type_str: set(_types(schema, one)) for one in schema.outputs} for schema in (before, after)]
    narrower = any(types[0].get(key, set()) - types[1][key] for key in types[1])
    return defaults[0] != defaults[1] or options[0] != options[1] or after.deprecated or narrower


def _types(schema: onnx.defs.OpSchema, one: onnx.defs.OpSchema.FormalParameter) -> list[str]:
    found = [c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == one.type_str]
    return list(found[0]) if found else [one.type_str]


REAL = [
    "squeezenet1.0/squeezenet1.0_fp32.onnx",
    "squeezenet1.0/SqueezeNet_fp16.onnx",
    "mnist/mnist_cntk.onnx",
    "face_rfb320/version-RFB-320.onnx",
    "fastestdet/FastestDet.onnx",
    "basic_pitch/nmp.onnx",
    "silero_vad/silero_vad_16k_op15.onnx",
]


@pytest.mark.parametrize("name", REAL)
def test_real_models_compute_the_same(assets, tmp_path, name: str):
    ort = pytest.importorskip("onnxruntime")
    model = qgraph.ir.load(assets / name)
    Pipeline([ConvertOpset()]).run(model)
    qgraph.ir.save(model, tmp_path / "after.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    sessions = [ort.InferenceSession(path, options) for path in (assets / name, tmp_path / "after.onnx")]
    random = np.random.default_rng(1)
    feeds = {}
    for value in sessions[0].get_inputs():
        shape = [dim if isinstance(dim, int) else {"sequence": 576}.get(dim, 1) for dim in value.shape]
        kind = {"tensor(float16)": np.float16, "tensor(float)": np.float32}.get(value.type)
        feeds[value.name] = np.array(16000) if kind is None else random.normal(size=shape).astype(kind)
    before, after = (session.run(None, feeds) for session in sessions)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
