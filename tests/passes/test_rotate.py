"""rotate: what a decoder computes stays, nothing is left to do at run time, and what cannot turn says why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import qgraph.ir
from qgraph.analysis.probes import Probe, raw_outputs
from qgraph.analysis.scale_folding import foldings, scale_input
from qgraph.models import corpus, pydoc_decoder
from qgraph.numerics.eigenbasis import eigenbasis
from qgraph.passes.rotate import Rotate
from qgraph.pipeline import Context, Pipeline, Report

GOLDEN = Path(__file__).resolve().parent.parent / "golden/rotate"
HEAD = '<ir_version: 11, opset_import: ["" : 23, "com.microsoft" : 1]>'
WIDTH, VOCABULARY = 16, 40
NORMS = {
    "fused": "{y} = RMSNormalization <axis = -1> ({x}, {w})",
    "contributed": "{y} = SimplifiedLayerNormalization <axis = -1, epsilon = 1.0e-5> ({x}, {w})",
    "decomposed": """
        {y}_square = Pow ({x}, two)
        {y}_mean = ReduceMean ({y}_square, last)
        {y}_sum = Add ({y}_mean, epsilon)
        {y}_root = Sqrt ({y}_sum)
        {y}_normal = Div ({x}, {y}_root)
        {y} = Mul ({w}, {y}_normal)""",
}


def decoder(norm: str = "fused", *, tied: bool = False, width: int = WIDTH, vocabulary: int = VOCABULARY) -> ir.Model:
    """Return two layers of grouped-query attention, biases here and there, and a gated feed-forward part."""
    rng = np.random.default_rng(7)
    constants: dict[str, np.ndarray] = {
        "two": np.array(2, np.float32),
        "epsilon": np.array(1e-5, np.float32),
        "last": np.array([-1], np.int64),
        "table": rng.normal(size=(vocabulary, width)).astype(np.float32),
        "positions": rng.normal(size=(1, 1, width)).astype(np.float32),
    }

    def weight(name: str, *shape: int) -> str:
        constants[name] = (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
        return name

    def normed(x: str, y: str) -> str:
        constants[f"{y}_w"] = np.exp(rng.normal(size=width)).astype(np.float32)
        return NORMS[norm].format(x=x, y=y, w=f"{y}_w")

    lines = ["e = Gather (table, ids)", "s0 = Add (e, positions)"]
    x = "s0"
    for n in range(2):
        lines += [
            normed(x, f"n{n}"),
            f"q{n} = MatMul (n{n}, {weight(f'wq{n}', width, 16)})",
            f"k{n} = MatMul (n{n}, {weight(f'wk{n}', width, 8)})",
            f"p{n} = MatMul (n{n}, {weight(f'wv{n}', width, 8)})",
            f"v{n} = Add (p{n}, {weight(f'bv{n}', 8)})",
            f"a{n} = Attention <q_num_heads = 4, kv_num_heads = 2, is_causal = 1> (q{n}, k{n}, v{n})",
            f"o{n} = MatMul (a{n}, {weight(f'wo{n}', 16, width)})",
            f"r{n} = Add (o{n}, {weight(f'bo{n}', width)})",
            f"h{n} = Add ({x}, r{n})",
            normed(f"h{n}", f"m{n}"),
            f"g{n} = MatMul (m{n}, {weight(f'wg{n}', width, 24)})",
            f"i{n} = Sigmoid (g{n})",
            f"u{n} = MatMul (m{n}, {weight(f'wu{n}', width, 24)})",
            f"j{n} = Mul (i{n}, u{n})",
            f"d{n} = MatMul (j{n}, {weight(f'wd{n}', 24, width)})",
            f"x{n} = Add (h{n}, d{n})",
        ]
        x = f"x{n}"
    lines.append(normed(x, "z"))
    lines.append("head = Transpose <perm = [1, 0]> (table)" if tied else "")
    lines.append("y = MatMul (z, head)" if tied else f"y = MatMul (z, {weight('head', width, vocabulary)})")
    return model_with(lines, constants, f"y: float[b, r, {vocabulary}]")


def model_with(lines: list[str], constants: dict[str, np.ndarray], output: str) -> ir.Model:
    kinds = {"float32": "float", "int64": "int64"}
    declared = [
        f"{kinds[str(array.dtype)]}[{', '.join(map(str, array.shape))}] {name}" for name, array in constants.items()
    ]
    name, _, kind = output.partition(": ")
    inputs = ", ".join(["int64[b, r] ids", *declared])
    model = ir.from_onnx_text(f"{HEAD}\ng ({inputs}) => ({kind} {name})\n{{\n{chr(10).join(lines)}\n}}")
    for value in list(model.graph.inputs)[1:]:
        value.const_value = ir.tensor(constants[str(value.name)], name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return model


def run(model: ir.Model, vocabulary: int = VOCABULARY) -> np.ndarray:
    feeds = {model.graph.inputs[0].name: np.random.default_rng(3).integers(0, vocabulary, (2, 9))}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def rotate(model: ir.Model, **options) -> Report:
    return Pipeline([Rotate(**options)]).run(model).parts[0]


def skeleton(model: ir.Model) -> str:
    """Return the nodes without attributes and names of nodes."""
    return "".join(
        f"{', '.join(str(one.name) for one in node.outputs)} = {node.op_type} "
        f"({', '.join(str(one.name) for one in node.inputs if one is not None)})\n"
        for node in model.graph
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{}, {"heads": False}, {"stream": False}, {"seed": 5}], ids=str)
def test_values_stay(norm: str, options: dict):
    exact, model = run(decoder(norm)), decoder(norm)
    report = rotate(model, **options)
    assert report.skipped == []
    assert report.changed == (16 if options.get("stream", True) else 0) + (4 if options.get("heads", True) else 0)
    assert qgraph.ir.check(model) is None
    np.testing.assert_allclose(run(model), exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_every_weight_of_the_stream_is_turned_and_the_gains_are_gone():
    model, before = decoder("decomposed"), decoder("decomposed")
    rotate(model)
    assert skeleton(model) == (GOLDEN / "decoder.txt").read_text()
    counts, old = (Counter(node.op_type for node in one.graph) for one in (model, before))
    assert old["Mul"] - counts["Mul"] == 5
    del old["Mul"], counts["Mul"]
    assert counts == old
    for name, value in before.graph.initializers.items():
        if name.startswith("w") or name in ("table", "positions", "bo0", "bv0"):
            new = next(one for one in model.graph.initializers if one.startswith(f"{name}_rotated"))
            turned = model.graph.initializers[new].const_value.numpy()
            assert turned.shape == value.const_value.numpy().shape
            assert np.abs(turned - value.const_value.numpy()).max() > 0.05
    table, turned = before.graph.initializers["table"], model.graph.initializers["table_rotated"]
    lengths = [np.linalg.norm(one.const_value.numpy(), axis=1) for one in (table, turned)]
    np.testing.assert_allclose(*lengths, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_second_run_changes_nothing(norm: str):
    model = decoder(norm)
    rotate(model)
    text = ir.to_onnx_text(model)
    assert rotate(model, seed=3).changed == 0
    assert ir.to_onnx_text(model) == text


def test_one_seed_gives_the_same_bytes_and_another_does_not():
    models = [decoder(), decoder(), decoder()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        rotate(model, seed=seed)
    first, again, other = (ir.to_proto(model).SerializeToString() for model in models)
    assert first == again != other


@pytest.mark.parametrize(
    ("vocabulary", "note", "matrices"),
    [
        (VOCABULARY, "'MatMul->y' shares its weight with the embedding: a product of 16 x 16", 1),
        (WIDTH, "'MatMul->y' got a weight of its own, 16 x 16", 2),
    ],
)
def test_a_tied_table_stays_one_where_that_is_smaller(vocabulary: int, note: str, matrices: int):
    model = decoder(tied=True, vocabulary=vocabulary)
    exact = run(model, vocabulary)
    report = rotate(model)
    assert any(one.startswith(note) for one in report.notes)
    np.testing.assert_allclose(run(model, vocabulary), exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    assert sum(name.startswith("table") for name in model.graph.initializers) == matrices


def test_a_tied_table_needs_nothing_behind_a_norm_of_ones():
    model = decoder(tied=True)
    model.graph.initializers["z_w"].const_value = ir.tensor(np.ones(WIDTH, np.float32), name="z_w")
    exact = run(model)
    assert len(rotate(model).notes) == 2
    np.testing.assert_allclose(run(model), exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    assert {"table_rotated"} == {name for name in model.graph.initializers if name.startswith("table")}


def changed(lines: dict[str, str]) -> ir.Model:
    """Return the decoder with some lines of its text replaced; `seen` is an output too if it is made."""
    model = decoder()
    text = skeletons(model)
    for old, new in lines.items():
        assert old in text
        text = text.replace(old, new)
    constants = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    return model_with(text.splitlines(), constants, f"y: float[b, r, {VOCABULARY}]")


def skeletons(model: ir.Model) -> str:
    attributes = {
        "RMSNormalization": "<axis = -1>",
        "Attention": "<q_num_heads = 4, kv_num_heads = 2, is_causal = 1>",
    }
    return "\n".join(
        f"{node.outputs[0].name} = {node.op_type} {attributes.get(node.op_type, '')} "
        f"({', '.join(str(one.name) for one in node.inputs if one is not None)})"
        for node in model.graph
    )


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "n1 = RMSNormalization <axis = -1> (x0, n1_w)",
            "n1 = LayerNormalization <axis = -1> (x0, n1_w)",
            "its mean over the channels is taken by 'LayerNormalization->n1' (LayerNormalization)",
        ),
        ("x0 = Add  (h0, d0)", "t0 = Tanh (h0)\nx0 = Add (t0, d0)", "'Tanh->t0' (Tanh)"),
        ("x0 = Add  (h0, d0)", "x0 = Add (m0, d0)", "'Add->x0' (Add) reads it times a weight for each channel"),
        ("r0 = Add  (o0, bo0)", "r0 = RMSNormalization <axis = -1> (o0, bo0)", "reads it times a weight"),
        ("r0 = Add  (o0, bo0)", "r0 = Add (o0, epsilon)", "it adds the same number to every channel"),
        ("h0 = Add  (s0, r0)", "h0 = Mul (s0, r0)", "its channels are multiplied one by one in 'Mul->h0' (Mul)"),
    ],
)
def test_what_cannot_turn_says_why(old: str, new: str, reason: str):
    model = changed({old: new})
    exact = run(model)
    report = rotate(model)
    told = " ".join(one.reason for one in report.skipped)
    assert reason in told
    assert not any("stream" in note for note in report.notes)
    np.testing.assert_allclose(run(model), exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_what_the_model_gives_out_stays():
    model = decoder()
    model.graph.outputs.append(next(value for node in model.graph for value in node.outputs if value.name == "h0"))
    assert "'h0' is an output of the model" in rotate(model).skipped[0].reason


@pytest.mark.parametrize("norm", NORMS)
def test_calibrated_every_channel_carries_the_same(norm: str):
    rng = np.random.default_rng(11)
    feeds = [{"ids": rng.integers(0, VOCABULARY, (1, 12))} for _ in range(6)]
    exact, model = run(decoder(norm)), decoder(norm)
    Pipeline([Rotate(heads=False)]).run(model, calibration=feeds)
    np.testing.assert_allclose(run(model), exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    readers = dict.fromkeys(node.inputs[0].name for node in model.graph if node.op_type == "MatMul")
    stream = [name for name in readers if name[0] in "nmz"]
    assert len(stream) == 5
    probe = Probe(model, raw_outputs(stream), frozenset(["ids"]))
    seen = [np.concatenate(arrays, axis=1) for arrays in zip(*(probe.run(feed) for feed in feeds), strict=True)]
    energy = sum(np.square(x, dtype=np.float64).sum(axis=(0, 1)) / np.square(x).sum() for x in seen)
    np.testing.assert_allclose(energy, energy.mean(), rtol=1e-3)


def test_principal_directions_do_not_depend_on_the_last_digits():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 24)) * np.geomspace(1, 20, 24)
    covariance = x.T @ x
    basis = eigenbasis(covariance)
    np.testing.assert_allclose(basis.T @ basis, np.eye(24), atol=1e-14)
    turned = basis.T @ covariance @ basis
    assert np.abs(turned - np.diag(turned.diagonal())).max() < 1e-4 * turned.max()
    assert (np.diff(turned.diagonal()) < 0).all()
    assert np.array_equal(eigenbasis(covariance * (1 + 1e-13 * rng.normal(size=(24, 24)))), basis)
    with pytest.raises(ValueError, match="not finite"):
        eigenbasis(np.full((2, 2), np.nan))


def test_the_trained_decoder_keeps_its_values():
    exact, model = run(pydoc_decoder.build(), 256), pydoc_decoder.build()
    report = rotate(model)
    assert report.changed == 38
    np.testing.assert_allclose(run(model, 256), exact, rtol=0, atol=1e-4)


def test_a_trained_decoder_with_outliers_loses_less():
    """The divergence of its predictions on held-out text from those in float, by rounding to 4 bits.

    Its channels are of very different size, as large models have them; the function is the same.
    """
    inputs = corpus.windows(corpus.held_out_text(), pydoc_decoder.WINDOW, 4)
    samples = [{"input_ids": one[None]} for one in corpus.windows(corpus.training_text(), pydoc_decoder.WINDOW, 2)]

    def chances(model: ir.Model) -> np.ndarray:
        proto = ir.to_proto(model).SerializeToString()
        session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
        logits = session.run(None, {"input_ids": inputs})[0].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    exact = chances(pydoc_decoder.build())

    def loss(*passes: Rotate) -> float:
        model, rng = pydoc_decoder.build(), np.random.default_rng(5)
        for folding in foldings(model, Context()):
            scale_input(model, folding, np.exp(rng.normal(size=folding.channels))[folding.tied], suffix="wild")
        prepared = [*Pipeline.parse("convert-opset{version=21}"), *passes]
        Pipeline([*prepared, *Pipeline.parse("rtn{bits=4,group=32,method=minmax}")]).run(model, calibration=samples)
        return float((np.exp(exact) * (exact - chances(model))).sum(axis=-1).mean())

    plain, random, calibrated = (loss(*some) for some in ([], [Rotate(calibrated=False)], [Rotate()]))
    assert random < 0.7 * plain, (random, plain)
    assert calibrated < 0.7 * plain, (calibrated, plain)
