"""`prune-heads`, `prune-neurons`, `prune-channels`: what they cut, what they leave alone, what the fit recovers."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.analysis.cost import cost
from qgraph.errors import UserError
from qgraph.models import digits_cnn, digits_encoder
from qgraph.models.data import Dataset
from qgraph.passes import PruneChannels, PruneHeads, PruneNeurons
from qgraph.pipeline import Feeds, Pipeline, Report
from qgraph.targets.cpu import CpuFp32

ENCODER = """<ir_version: 9, opset_import: ["" : 20]>
g (float[n,s,16] x) => (float[n,s,16] y) {
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    v = MatMul (x, wv)
    q4 = Reshape (q, apart)
    k4 = Reshape (k, apart)
    v4 = Reshape (v, apart)
    qh = Transpose <perm = [0,2,1,3]> (q4)
    kh = Transpose <perm = [0,2,3,1]> (k4)
    vh = Transpose <perm = [0,2,1,3]> (v4)
    scores = MatMul (qh, kh)
    shares = Softmax <axis = -1> (scores)
    mixed = MatMul (shares, vh)
    turned = Transpose <perm = [0,2,1,3]> (mixed)
    merged = Reshape (turned, joined)
    [out] o = MatMul (merged, wo)
    a = Add (o, x)
    h = MatMul (a, w1)
    hb = Add (h, b1)
    r = Relu (hb)
    [down] d = MatMul (r, w2)
    y = Add (d, a)
}
"""
SHAPES = {"wq": (16, 16), "wk": (16, 16), "wv": (16, 16), "wo": (16, 16), "w1": (16, 24), "b1": (24,), "w2": (24, 16)}


def encoder(seed: int = 0) -> ir.Model:
    proto = onnx.parser.parse_model(ENCODER)
    random = np.random.default_rng(seed)
    arrays = {name: (random.normal(size=shape) / 4).astype(np.float32) for name, shape in SHAPES.items()}
    arrays |= {"apart": np.array([0, 0, 4, 4]), "joined": np.array([0, 0, 16])}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def samples(count: int = 8, seed: int = 1) -> list[Feeds]:
    random = np.random.default_rng(seed)
    return [{"x": random.normal(size=(4, 6, 16)).astype(np.float32)} for _ in range(count)]


def outputs(model: ir.Model, feeds: list[Feeds]) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in feeds])


def shape(model: ir.Model, name: str) -> tuple[int, ...]:
    return tuple(model.graph.initializers[name].const_value.shape.numpy())


def prune(model: ir.Model, *passes: object, data: bool = True) -> Report:
    return Pipeline(passes).run(model, calibration=samples() if data else None)


def test_heads_and_what_goes_with_them():
    model = encoder()

    report = prune(model, PruneHeads(ratio=0.5))

    assert [shape(model, name) for name in ("wq", "wk", "wv", "wo")] == [(16, 8), (16, 8), (16, 8), (8, 16)]
    assert shape(model, "w1") == (16, 24)
    assert report.changed == 2
    assert qgraph.ir.check(model) is None
    assert outputs(model, samples(1)).shape == (4, 6, 16)


def test_neurons_and_what_goes_with_them():
    model = encoder()

    report = prune(model, PruneNeurons(ratio=0.3, multiple=8))

    assert [shape(model, name) for name in ("w1", "b1", "w2")] == [(16, 16), (16,), (16, 16)]
    assert shape(model, "wq") == (16, 16)
    assert report.parts[0].figures == {"neurons": {"MatMul->h": [24, 16]}}


@pytest.mark.parametrize("measure", ["magnitude", "activation", "reconstruction", "taylor"])
def test_a_unit_that_does_nothing_goes_first(measure: str):
    model = encoder()
    wo = model.graph.initializers["wo"].const_value.numpy().copy()
    wo[4:8] = 1e-4  # the second head
    model.graph.initializers["wo"].const_value = ir.tensor(wo, name="wo")
    if measure == "magnitude":
        for name in ("wq", "wk", "wv"):
            array = model.graph.initializers[name].const_value.numpy().copy()
            array[:, 4:8] *= 1e-3
            model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    exact = outputs(model, samples(2, seed=5))

    prune(model, PruneHeads(ratio=0.25, importance=measure, reconstruct=False))

    np.testing.assert_allclose(outputs(model, samples(2, seed=5)), exact, atol=0.02)


def test_the_fit_recovers_most_of_the_error():
    exact = outputs(encoder(), samples(4, seed=5))
    errors = []
    for fitted in (False, True):
        model = encoder()
        prune(model, PruneNeurons(ratio=0.25, importance="magnitude", reconstruct=fitted))
        errors.append(np.square(outputs(model, samples(4, seed=5)) - exact).sum())

    assert errors[1] < 0.6 * errors[0]


def test_without_data_the_magnitude_decides_and_nothing_is_fitted():
    model = encoder()

    report = prune(model, PruneHeads(ratio=0.25), data=False)

    assert report.changed == 1
    assert any("not fitted" in note for note in report.notes)
    with pytest.raises(UserError, match="'prune-heads' with importance=taylor needs calibration data"):
        prune(encoder(), PruneHeads(importance="taylor"), data=False)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 2.0])
def test_a_ratio_outside_is_refused(ratio: float):
    with pytest.raises(UserError, match="is not between 0 and 1"):
        Pipeline.parse(f"prune-heads{{ratio={ratio}}}")


def test_a_number_that_there_is_not_is_told():
    report = prune(encoder(), PruneHeads(keep=7))

    assert report.changed == 0
    assert [tuple(one) for one in report.skipped] == [
        ("MatMul->q", "it has 4 heads, fewer than the 7 that are to stay")
    ]


def test_what_is_left_alone_says_why():
    report = prune(encoder(), PruneNeurons(exclude=("down",)))

    assert report.changed == 0
    reasons = {one.reason for one in report.skipped}
    assert "it is excluded" in reasons
    assert any("is an input of the model" in reason for reason in reasons)


def test_a_weight_that_is_not_finite_is_named():
    model = encoder()
    array = model.graph.initializers["w2"].const_value.numpy().copy()
    array[0, 0] = np.nan
    model.graph.initializers["w2"].const_value = ir.tensor(array, name="w2")
    with pytest.raises(UserError, match="the weight 'w2' of 'down' holds NaN"):
        prune(model, PruneNeurons())


def test_one_sample_is_told_to_be_few():
    model = encoder()

    report = Pipeline([PruneNeurons()]).run(model, calibration=[{"x": samples(1)[0]["x"][:1, :2]}])

    assert report.changed == 6
    assert any("there are only 2 rows for the inputs of 'down'" in note for note in report.notes)
    assert np.isfinite(outputs(model, samples(1))).all()


def small(body: str, outputs: str = "float[n,s,16] y", **shapes: tuple[int, ...]) -> ir.Model:
    opsets = '"" : 20, "com.microsoft" : 1'
    text = f"<ir_version: 9, opset_import: [{opsets}]> g (float[n,s,16] x) => ({outputs}) {{ {body} }}"
    proto = onnx.parser.parse_model(text)
    for number, (name, dims) in enumerate(shapes.items()):
        array = np.random.default_rng(number).normal(size=dims).astype(np.float32) / 4
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


SQUARE = dict.fromkeys(("wq", "wk", "wv", "wo"), (16, 16))
GROUPED = "(q, k, v, , , lengths, total)"
PROJECTED = "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)"


@pytest.mark.parametrize(
    ("attention", "shapes", "reason"),
    [
        (
            f"{PROJECTED} [att] a = com.microsoft.MultiHeadAttention <num_heads = 3> (q, k, v)",
            SQUARE,
            "the heads of 'att' (MultiHeadAttention) are not certain",
        ),
        (
            "[att] a = com.microsoft.Attention <num_heads = 4> (x, w, b)",
            {"w": (16, 48), "b": (48,), "wo": (16, 16)},
            "'att' (Attention) is not understood",
        ),
        (
            f'{PROJECTED} [att] s = Einsum <equation = "bik,bjk->bij"> (q, k) p = Softmax (s) a = MatMul (p, v)',
            SQUARE,
            "'att' (Einsum) is not understood",
        ),
        (
            f"{PROJECTED} [att] a = com.microsoft.GroupQueryAttention <num_heads = 6, kv_num_heads = 2> {GROUPED}",
            {**SQUARE, "lengths": (1,), "total": (1,)},
            "the heads of 'att' (GroupQueryAttention) are not certain",
        ),
    ],
    ids=["heads that do not divide", "packed", "einsum", "groups that do not divide"],
)
def test_attention_that_is_not_followed_is_told(attention: str, shapes: dict[str, tuple[int, ...]], reason: str):
    model = small(f"{attention} y = MatMul (a, wo)", **shapes)
    before = ir.to_proto(model).SerializeToString()

    report = prune(model, PruneHeads(), data=False)

    assert ("att", reason) in [tuple(one) for one in report.skipped]
    assert ir.to_proto(model).SerializeToString() == before


def test_a_model_without_heads_is_told():
    report = prune(small("y = MatMul (x, w)", w=(16, 16)), PruneHeads(), data=False)

    assert list(report.notes) == ["no heads were found"]


def test_a_layer_that_is_an_output_stays():
    body = "h = MatMul (x, w1) r = Relu (h) y = MatMul (r, w2)"
    model = small(body, "float[n,s,16] y, float[n,s,24] h", w1=(16, 24), w2=(24, 16))

    report = prune(model, PruneNeurons(), data=False)

    assert report.changed == 0
    assert tuple(report.skipped[0]) == ("MatMul->h", "'h' is an output of the model")
    assert (shape(model, "w1"), shape(model, "w2")) == ((16, 24), (24, 16))


def test_a_weight_of_two_layers_is_cut_for_both_or_for_none():
    both = small(
        "h = MatMul (x, w1) r = Relu (h) h2 = MatMul (r, w) r2 = Relu (h2) h3 = MatMul (r2, w) y = MatMul (h3, w2)",
        w1=(16, 8), w=(8, 8), w2=(8, 16),
    )  # fmt: skip
    none = small("h = MatMul (x, w) r = Relu (h) y = MatMul (r, w)", w=(16, 16))

    assert prune(both, PruneNeurons(), data=True).changed == 2
    assert [shape(both, name) for name in ("w1", "w", "w2")] == [(16, 6), (6, 6), (6, 16)]
    assert np.isfinite(outputs(both, samples(1))).all()
    assert prune(none, PruneNeurons(), data=True).changed == 0


def test_the_same_every_time():
    models = [encoder(), encoder()]
    for model in models:
        prune(model, PruneHeads(), PruneNeurons())

    assert ir.to_proto(models[0]).SerializeToString() == ir.to_proto(models[1]).SerializeToString()


def test_ranked_together_layers_lose_what_they_can_spare():
    model = encoder()
    array = model.graph.initializers["w2"].const_value.numpy() * np.float32(1e-3)
    model.graph.initializers["w2"].const_value = ir.tensor(array, name="w2")

    report = prune(model, PruneNeurons(scope="global", ratio=0.5, least=4))

    assert report.changed == 12


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("passes", ["prune-channels", "prune-neurons"])
def test_a_share_of_the_multiply_adds_is_cut(passes: str, scope: str):
    model = digits_cnn.build() if passes == "prune-channels" else encoder()
    CpuFp32().prepare_passes().run(model)
    before = cost(model).multiply_adds

    Pipeline.parse(f"{passes}{{ratio=0.2,of=multiply-adds,scope={scope}}}").run(model)

    # What is cut comes in whole units; products of two activations, 12 % of the encoder's, are not counted.
    assert 0.72 * before < cost(model).multiply_adds <= 0.84 * before


def test_a_very_deep_network_is_pruned():
    nodes = []
    for layer in range(300):
        x = f"d{layer - 1}" if layer else "x"
        nodes += [f"h{layer} = MatMul (x, w1)".replace("(x", f"({x}"), f"r{layer} = Relu (h{layer})"]
        nodes += [f"m{layer} = MatMul (r{layer}, w2)", f"d{layer} = Tanh (m{layer})"]
    text = f"g (float[n,s,4] x) => (float[n,s,4] y) {{ {' '.join(nodes)} y = Identity (d299) }}"
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 20]> {text}')
    for name, dims in (("w1", (4, 8)), ("w2", (8, 4))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(*dims, dtype=np.float32), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))

    report = Pipeline([PruneNeurons(ratio=0.25)]).run(model)

    assert report.changed == 2
    assert (shape(model, "w1"), shape(model, "w2")) == ((4, 6), (6, 4))


def calls_for(layers: int, passes: str) -> int:
    """Return how many functions are called to prune a chain of so many layers: what time is, without a clock."""
    body, x, shapes = [], "x", {}
    for number in range(layers):
        body.append(f"h{number} = MatMul ({x}, u{number}) r{number} = Relu (h{number})")
        body.append(f"d{number} = MatMul (r{number}, w{number}) a{number} = Add (d{number}, {x})")
        x, shapes = f"a{number}", {**shapes, f"u{number}": (16, 4), f"w{number}": (4, 16)}
    model = small(f"{' '.join(body)} y = Identity ({x})", **shapes)
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        Pipeline.parse(passes).run(model)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("passes", ["prune-neurons", "prune-heads", "low-rank{min_elements=0}"])
def test_work_grows_with_the_number_of_layers(passes: str):
    calls_for(10, passes)  # what is made on first use does not count

    assert calls_for(160, passes) < 4.6 * calls_for(40, passes)


def accuracy(model: ir.Model, images: str, dataset: Dataset) -> float:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    logits = session.run(None, {images: dataset.evaluation[images]})[0]
    return float(np.mean(logits.argmax(axis=1) == dataset.labels))


def trained(module: ModuleType, *passes: object) -> tuple[float, float, int, int]:
    """Return accuracy before and after, and parameters before and after, of a shipped model."""
    model, dataset = module.build(), module.dataset()
    CpuFp32().prepare_passes().run(model)
    (name, images), *_ = dataset.calibration.items()
    feeds = [{name: images[start : start + 16]} for start in range(0, 64, 16)]
    facts = [(accuracy(model, name, dataset), size(model))]
    Pipeline(passes).run(model, calibration=feeds)
    facts.append((accuracy(model, name, dataset), size(model)))
    return facts[0][0], facts[1][0], facts[0][1], facts[1][1]


def size(model: ir.Model) -> int:
    return sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)


def test_the_digits_network_keeps_its_accuracy_with_a_third_of_the_weights_less():
    before, after, parameters, left = trained(digits_cnn, PruneChannels(ratio=0.2, importance="activation"))

    assert left < 0.7 * parameters
    assert after >= before - 0.01


def test_the_digits_encoder_keeps_its_accuracy():
    before, after, parameters, left = trained(digits_encoder, PruneHeads(ratio=0.25), PruneNeurons(ratio=0.25))

    assert left < 0.9 * parameters
    assert after >= before - 0.01
