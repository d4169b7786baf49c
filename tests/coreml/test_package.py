"""Packages: what is written, that it repeats to the byte, and that damage is found."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("coremltools", reason="coremltools is not installed")

sys.path.insert(0, str(Path(__file__).parent))

from package_build import assert_same, in_onnxruntime, package

from qgraph.coreml import elementwise
from qgraph.coreml.interpreter import Interpreter
from qgraph.coreml.lowering import RULES
from qgraph.coreml.program import read_package
from qgraph.coreml.session import PackageSession
from qgraph.coreml.structure import Stored, examine
from qgraph.errors import UserError
from qgraph.models import digits_cnn
from qgraph.pipeline import Context, Pipeline

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
PROGRAM = "Data/com.apple.CoreML/model.mlmodel"


def parsed(text: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text}')


def matrix(shape: tuple[int, int], seed: int = 0) -> str:
    numbers = np.random.default_rng(seed).normal(size=shape).round(3)
    return f"float[{shape[0]},{shape[1]}] w = {{{', '.join(map(str, numbers.ravel()))}}}"


def product(width: int = 64, columns: int = 32) -> ir.Model:
    return parsed(
        f"g (float[4,{width}] x) => (float[4,{columns}] y) <{matrix((width, columns))}> {{ y = MatMul (x, w) }}"
    )


def feed(model: ir.Model) -> dict[str, np.ndarray]:
    (x,) = model.graph.inputs
    return {str(x.name): np.random.default_rng(5).normal(size=x.shape.numpy()).astype(np.float32)}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = digits_cnn.build()
    for value in model.graph.inputs:
        value.shape = ir.Shape([1, *list(value.shape)[1:]])
    weights = "rtn{bits=8,group=0,symmetric=true,ops=[Conv,Gemm]}"
    passes = f"convert-opset{{version=21}},fold-constants,fold-batch-norm,infer-shapes,{weights},to-fp16"
    return package(model, tmp_path_factory.mktemp("digits"), f"{passes},infer-shapes")


def test_a_package_is_well_formed(digits: Path):
    found = examine(digits)
    assert found.faults == ()
    assert found.weights["blockwise_shift_scale"].count == sum(found.reads_compressed.values()) > 3
    assert read_package(digits).version == 9


def test_two_builds_are_equal_to_the_byte(tmp_path: Path):
    files = []
    for name in ("first", "second"):
        folder = package(product(), tmp_path / name, "rtn{bits=4,group=32},to-fp16,infer-shapes")
        files.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    assert files[0] == files[1]
    assert len(files[0]) == 3


def test_names_types_and_sizes_are_those_of_the_source(tmp_path: Path):
    model = parsed("""
        g (float[2,3] x, int64 n, bool[3] mask, float[7] unread) => (float[2,3] y, int64 m, bool[3] out, float[2,3] x2)
        {
            negative = Neg (x)
            y = Where (mask, x, negative)
            m = Add (n, n)
            out = Not (mask)
            x2 = Identity (x)
        }
    """)
    model.graph.inputs[0].name, model.graph.outputs[0].name = "serving:0", "serving_0"
    model.graph.outputs[3].name = "copy/1"
    feeds = {
        "serving:0": np.arange(6, dtype=np.float32).reshape(2, 3),
        "n": np.array(-4, np.int64),
        "mask": np.array([True, False, True]),
        "unread": np.zeros(7, np.float32),
    }
    written = assert_same(model, feeds, tmp_path)
    session = PackageSession(written)
    assert [one.name for one in session.inputs] == ["serving:0", "n", "mask"]
    features = [one.name for one in read_package(written).inputs]
    assert len(set(features)) == 3
    assert all(name.isidentifier() for name in features)
    assert session.run(["m"], feeds)[0].tolist() == -8
    with pytest.raises(UserError, match="input 'n' is missing"):
        session.run(None, {name: array for name, array in feeds.items() if name != "n"})
    with pytest.raises(UserError, match=r"compile it with --shape serving:0=5,3"):
        session.run(None, {**feeds, "serving:0": np.zeros((5, 3), np.float32)})
    with pytest.raises(UserError, match="no output 'z'"):
        session.run(["z"], feeds)


def test_a_branch_becomes_a_block(tmp_path: Path):
    model = parsed("""
        g (float[2,3] x, bool c) => (float[2,3] y) <float[3] w = {1, 2, 3}> {
            d = Mul (x, w)
            y = If (c) <
                then_branch = a () => (float[2,3] p) { p = Add (d, w) },
                else_branch = b () => (float[2,3] q) { r = Neg (x) q = Mul (r, w) }>
        }
    """)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for taken in (True, False):
        written = assert_same(model.clone(), {"x": x, "c": np.array(taken)}, tmp_path / str(taken))
    assert examine(written).operations["cond"] == 1
    assert examine(written).faults == ()


# --- weights -----------------------------------------------------------------------------------------------------


WIDTH, COLUMNS = 64, 32
SIZE = WIDTH * COLUMNS
ROWS = 2 * COLUMNS
FORMS = [
    ("rtn{bits=8,group=0,symmetric=true}", "blockwise_shift_scale", SIZE + ROWS),
    ("rtn{bits=4,group=32,symmetric=true}", "blockwise_shift_scale", SIZE // 2 + 2 * ROWS),
    ("rtn{bits=4,group=32}", "blockwise_shift_scale", SIZE // 2 + 2 * ROWS + 2 * COLUMNS // 2),
    ("rtn{bits=3,group=32,symmetric=true}", "blockwise_shift_scale + lut_to_dense", SIZE * 3 // 8 + 2 * ROWS + 8),
    ("rtn{bits=3,group=32}", "blockwise_shift_scale + lut_to_dense", SIZE * 3 // 8 + 2 * ROWS + 8 + 2 * COLUMNS),
    ("rtn{format=nf4,group=32}", "blockwise_shift_scale + lut_to_dense", SIZE // 2 + 2 * ROWS + 16),
    ("rtn{format=ternary,group=32}", "blockwise_shift_scale + lut_to_dense", SIZE // 4 + 2 * ROWS + 4),
    ("rtn{bits=6,group=0,symmetric=true}", "blockwise_shift_scale + lut_to_dense", SIZE * 6 // 8 + ROWS + 64),
]
"""Passes, the form that the weight takes, and its bytes: codes, float16 scales, and offsets or a table."""


@pytest.mark.parametrize(("passes", "form", "size"), FORMS, ids=[one[0] for one in FORMS])
def test_integers_and_scales_are_stored_as_they_were_quantized(passes: str, form: str, size: int, tmp_path: Path):
    model = product(WIDTH, COLUMNS)
    Pipeline.parse(f"{passes},to-fp16").run(model, context=Context())
    expected = in_onnxruntime(model, feed(model))[0]
    written = package(model, tmp_path)
    assert examine(written).weights[form] == Stored(1, size)
    got = PackageSession(written).run(None, feed(model))[0]
    # Both hold the products' sums of the same float16 weights; ONNX Runtime takes sums of float16 in its own way.
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-3 * np.abs(expected).max())


def test_weights_in_float32_are_exact(tmp_path: Path):
    model = product()
    Pipeline.parse("rtn{bits=4,group=32}").run(model, context=Context())
    assert_same(model, feed(model), tmp_path, tolerance=1e-6)


def test_groups_that_do_not_divide_the_inputs_get_finer_scales(tmp_path: Path):
    model = product(100, 16)
    Pipeline.parse("rtn{bits=4,group=32,symmetric=true}").run(model, context=Context())
    written = assert_same(model, feed(model), tmp_path, tolerance=1e-6)
    (scale,) = [
        argument.spec.shape
        for one in read_package(written).block.walk()
        for argument in one.inputs.get("scale", ())
        if argument.spec is not None
    ]
    assert scale == (16, 25)


@pytest.mark.parametrize(
    "passes",
    [
        "sparsify{pattern=unstructured,ratio=0.7}",
        "sparsify{pattern=unstructured,ratio=0.7},rtn{bits=8,group=0,symmetric=true}",
    ],
)
def test_zeros_are_left_out(passes: str, tmp_path: Path):
    model = product()
    Pipeline.parse(passes).run(model, context=Context(), calibration=[feed(model)] * 2)
    written = assert_same(model, feed(model), tmp_path, tolerance=1e-6)
    (form, stored), *_ = sorted(examine(written).weights.items(), key=lambda one: -one[1].bytes)
    assert "sparse_to_dense" in form
    assert stored.bytes < 0.6 * 64 * 32 * (1 if "scale" in form else 4)


def test_a_bias_of_32_bits_is_written_out(tmp_path: Path):
    model = parsed("""
        g (float[2,4] x) => (float[2,4] y) <int32[4] q = {-70000, 3, 0, 2000000}, float s = {0.001}> {
            b = DequantizeLinear (q, s)
            y = Add (x, b)
        }
    """)
    written = assert_same(model, feed(model), tmp_path, tolerance=1e-6)
    assert not examine(written).reads_compressed


def test_a_tied_weight_is_stored_once_for_each_layout(tmp_path: Path):
    model = parsed(f"""
        g (float[4,64] x, float[2,2,4,64] v) => (float[4,32] y, float[4,32] z, float[2,2,4,32] u)
        <{matrix((64, 32))}> {{ y = MatMul (x, w) r = Relu (x) z = MatMul (r, w) u = MatMul (v, w) }}
    """)
    Pipeline.parse("rtn{bits=8,group=0}").run(model, context=Context())
    written = package(model, tmp_path)
    assert examine(written).weights["blockwise_shift_scale"].count == 2


# --- damage ------------------------------------------------------------------------------------------------------


def broken(source: Path, folder: Path, name: str, change: Callable[[bytearray], bytes | bytearray]) -> Path:
    copy = folder / "copy.mlpackage"
    shutil.copytree(source, copy)
    (copy / name).write_bytes(change(bytearray((copy / name).read_bytes())))
    return copy


def poked(offset: int, value: int) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[offset] = value
        return data

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-8], "reaches beyond"),
        (lambda data: b"", "it has no header"),
        (poked(4, 1), "no header of version 2"),
        (poked(64, 0), "there is no weight at 64"),
        (poked(68, 3), "not what the program says"),
        (poked(72, 1), "not what the program says"),
        (poked(80, 0), "overlap"),
    ],
)
def test_damage_to_the_weights_is_found(
    change: Callable[[bytearray], bytes], message: str, digits: Path, tmp_path: Path
):
    faults = examine(broken(digits, tmp_path, WEIGHTS, change)).faults
    assert any(message in fault for fault in faults), faults


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_a_program_that_is_cut_off_is_told(share: float, digits: Path, tmp_path: Path):
    cut = broken(digits, tmp_path, PROGRAM, lambda data: data[: int(share * len(data))])
    with pytest.raises(UserError, match="is damaged"):
        read_package(cut)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [(b"conv", b"conw", "'conw' is not known"), (b"CoreML8", b"CoreML7", "are not 9 and CoreML8")],
)
def test_what_a_program_should_not_hold_is_found(old: bytes, new: bytes, message: str, digits: Path, tmp_path: Path):
    faults = examine(broken(digits, tmp_path, PROGRAM, lambda data: data.replace(old, new))).faults
    assert any(message in fault for fault in faults), faults


def test_an_operation_that_is_not_known_is_not_run(digits: Path, tmp_path: Path):
    other = broken(digits, tmp_path, PROGRAM, lambda data: data.replace(b"conv", b"conw"))
    (image,) = read_package(other).inputs
    with pytest.raises(UserError, match="operation 'conw'"):
        Interpreter(other).run({image.name: np.zeros(image.shape, np.float32)})


@pytest.mark.parametrize(
    "text", ["", "{}", '{"rootModelIdentifier": "A", "itemInfoEntries": {"A": {"path": "../../x"}}}']
)
def test_a_folder_that_is_no_package_is_told(text: str, tmp_path: Path):
    (tmp_path / "Manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"no Core ML package|do not trust it"):
        read_package(tmp_path)


def test_a_rule_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The interpreter has its own definitions: a rule that computes something else does not pass."""
    monkeypatch.setitem(RULES, "Softplus", elementwise.RULES["Softsign"])
    model = parsed("g (float[4] x) => (float[4] y) { y = Softplus (x) }")
    with pytest.raises(AssertionError):
        assert_same(model, feed(model), tmp_path)
