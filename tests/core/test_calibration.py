import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import qgraph.ir
from qgraph.analysis import activations, probes, reductions
from qgraph.analysis.activations import Watch
from qgraph.analysis.calibration import METHODS, calibrate
from qgraph.analysis.reductions import Request
from qgraph.errors import UserError
from qgraph.feeds import InputSpec
from qgraph.numerics.schemes import INT8, UINT8
from qgraph.pipeline import Context
from qgraph.samples import open_samples, split

CNN = """
<ir_version: 8, opset_import: ["" : {opset}]>
cnn (float[n, 2, 8, 8] x) => (float[n, 5] y)
<int64[2] flat = {{-1, 4}}>
{{
    c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
    r = Relu (c)
    d = Mul (r, r)
    p = GlobalAveragePool (d)
    f = Reshape (p, flat)
    y = MatMul (f, w2)
}}
"""
INNER = ("c", "r", "d", "p", "f")


def parse(text, weights=None):
    """Return the model of ONNX text, with initializers besides those in the text."""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(*item[::-1]) for item in (weights or {}).items())
    return ir.from_proto(proto)


def cnn(opset=17, shapes=True):
    random = np.random.default_rng(0)
    weights = {"w": (4, 2, 3, 3), "b": (4,), "w2": (4, 5)}
    model = parse(
        CNN.format(opset=opset), {name: random.standard_normal(shape).astype("f") for name, shape in weights.items()}
    )
    if shapes:
        model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    return model


def images(count=6, batch=2, seed=1):
    random = np.random.default_rng(seed)
    return [{"x": random.standard_normal((batch, 2, 8, 8)).astype("f") * (1 + n)} for n in range(count)]


def fetched(model, names, feeds):
    """Return each tensor for every feed, as ONNX Runtime computes it without any rewriting of the graph."""
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    for name in names:
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, zip(*(session.run(None, feed) for feed in feeds), strict=True), strict=True))


def context(feeds, **options):
    return Context(calibration=feeds, threads=1, **options)


@pytest.mark.parametrize("opset", [7, 11, 12, 13, 17, 18, 23])
@pytest.mark.parametrize("shapes", [True, False])
def test_bounds_are_those_of_the_fetched_tensors(opset, shapes):
    model, feeds = cnn(opset, shapes=shapes), images()
    names = ("x", *INNER, "y", "w2")
    ranges = calibrate(model, context(feeds), names, "minmax", UINT8, (("r", 1), ("f", -1), ("b", 0)))
    assert list(ranges) == [*names, "b"]
    assert ranges.unavailable == {}
    tensors = fetched(model, [*names, "b"], feeds)
    for name, arrays in tensors.items():
        array = np.concatenate(arrays)
        low, high = array.min(), array.max()
        if name == "r":
            low, high = array.min(axis=(0, 2, 3)), array.max(axis=(0, 2, 3))
        elif name == "f":
            low, high = array.min(axis=0), array.max(axis=0)
        elif name == "b":
            low = high = arrays[0]
        np.testing.assert_allclose(ranges[name].low, low, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ranges[name].high, high, rtol=1e-5, atol=1e-6)
        assert ranges[name].low.dtype == np.float64
        assert ranges[name].low.shape == np.shape(low)


def test_the_model_is_left_as_it_was_and_the_result_is_cached_by_the_context():
    model, feeds = cnn(), images()
    before = ir.to_onnx_text(model)
    shared = context(feeds)
    first = shared.analyse(calibrate, model, INNER)
    assert shared.analyse(calibrate, model, INNER) is first
    assert ir.to_onnx_text(model) == before
    assert qgraph.ir.check(model) is None


@pytest.fixture
def opened(monkeypatch):
    """The watched tensors of every session that is opened to reduce them."""
    groups = []
    original = reductions.reduced_outputs

    def spy(requests, kinds):
        groups.append([request.tensor for request in requests])
        return original(requests, kinds)

    monkeypatch.setattr(reductions, "reduced_outputs", spy)
    return groups


BYTES = {"c": 2048, "r": 2048, "d": 2048, "p": 32, "f": 32}
"""Of a feed of two images."""


@pytest.mark.parametrize("shapes", [True, False])
@pytest.mark.parametrize(
    ("bound", "groups"),
    [
        (10**9, [["c", "r", "d", "p", "f"]]),
        (4096, [["c", "r"], ["d", "p", "f"]]),
        (2080, [["c"], ["r"], ["d", "p"], ["f"]]),
        (1, [["c"], ["r"], ["d"], ["p"], ["f"]]),
    ],
)
def test_the_graph_is_run_in_slices_that_fit_the_bound(opened, bound, groups, shapes):
    model, feeds = cnn(shapes=shapes), images()
    whole = calibrate(model, context(feeds), INNER)
    opened.clear()
    sliced = calibrate(model, context(feeds, calibration_memory=bound), INNER)
    assert opened == groups
    assert all(sum(BYTES[name] for name in group) <= bound for group in groups if len(group) > 1)
    for name in INNER:
        # A slice may be fused differently: the last digit may differ.
        np.testing.assert_allclose(sliced[name].low, whole[name].low, rtol=1e-6)
        np.testing.assert_allclose(sliced[name].high, whole[name].high, rtol=1e-6)


@pytest.mark.parametrize("shapes", [True, False])
def test_a_feed_that_is_larger_than_the_first_is_cut_further(opened, shapes):
    feeds = [*images(2), *images(2, batch=4)]
    calibrate(cnn(shapes=shapes), context(feeds, calibration_memory=4096), ("c", "r", "d"))
    assert opened == [["c", "r"], ["c"], ["r"], ["d"]]


def test_a_session_holds_no_weights_of_its_own_and_only_what_its_tensors_need(monkeypatch):
    rows = np.ones((1000, 1000), np.float32)
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    big (float[2, 1000] x) => (float[2, 1000] z)
    { y = MatMul (x, w)  z = MatMul (y, v) }
    """
    sizes, operators = [], []
    original = onnxruntime.InferenceSession

    def spy(model, *arguments, **options):
        sizes.append(len(model))
        operators.append([node.op_type for node in onnx.load_from_string(model).graph.node])
        return original(model, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    ranges = calibrate(parse(text, {"w": rows, "v": rows}), context([{"x": np.ones((2, 1000), np.float32)}]), ("y",))
    assert (ranges["y"].low, ranges["y"].high) == (1000.0, 1000.0)
    assert max(sizes) < 4000
    assert operators[-1].count("MatMul") == 1


def test_a_model_with_external_data_is_read_where_it_lies(tmp_path):
    model, feeds = cnn(), images()
    ir.save(model, tmp_path / "m.onnx", external_data="m.data")
    loaded = qgraph.ir.load(tmp_path / "m.onnx")
    here, there = (calibrate(one, context(feeds), INNER) for one in (model, loaded))
    assert all(here[name].high == there[name].high for name in INNER)


def test_initializers_that_are_inputs_too_are_constants_unless_they_are_fed():
    text = """
    <ir_version: 3, opset_import: ["" : 9]>
    old (float[2] x, float[2] w = {1, 2}) => (float[2] y)
    { y = Mul (x, w) }
    """
    model = parse(text)
    assert model.graph.inputs[1].name in model.graph.initializers
    x = np.ones(2, np.float32)
    assert calibrate(model, context([{"x": x}]), ("y",))["y"].high == 2.0
    assert calibrate(model, context([{"x": x, "w": x * 5}]), ("y",))["y"].high == 5.0


SUBGRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
choose (float[4] x, bool c) => (float[4] y)
{
    z = Neg (x)
    y = If (c) <
        then_branch = yes () => (float[4] inside) { inside = Mul (z, z) },
        else_branch = no () => (float[4] other) { other = Add (z, z) }
    >
}
"""


def test_what_cannot_be_watched_is_told_and_the_rest_is_not_held_up():
    model = parse(SUBGRAPH)
    feeds = [{"x": np.arange(4, dtype=np.float32), "c": np.array(value)} for value in (True, False)]
    ranges = calibrate(model, context(feeds), ("z", "inside", "c", "y"), "minmax", UINT8, (("x", 1),))
    assert sorted(ranges) == ["y", "z"]
    assert (ranges["y"].low, ranges["y"].high) == (-6.0, 9.0)
    assert ranges.unavailable == {
        "inside": "it lies inside a subgraph of node 'If->y' (If)",
        "c": "it does not hold real numbers (bool)",
        "x": "it has 1 dimensions, and so no axis 1",
    }
    with pytest.raises(ValueError, match="no value 'nowhere'"):
        calibrate(model, context(feeds), ("nowhere",))


def test_functions_of_the_model_are_run():
    text = """
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    caller (float[3] x) => (float[3] y) { h = local.twice (x)  y = Neg (h) }
    <domain: "local", opset_import: ["" : 17]>
    twice (a) => (b) { b = Add (a, a) }
    """
    ranges = calibrate(parse(text), context([{"x": np.array([1, 2, 3], np.float32)}]), ("h",))
    assert (ranges["h"].low, ranges["h"].high) == (2.0, 6.0)


def test_empty_tensors_are_passed_over():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    cat (float[n, 3] past, float[m, 3] x) => (float[k, 3] y)
    { p = Neg (past)  y = Concat <axis = 0> (p, x) }
    """
    x = np.array([[1, 2, 3]], np.float32)
    empty = {"past": np.empty((0, 3), np.float32), "x": x}
    model = parse(text)
    only_empty = calibrate(model, context([empty]), ("p", "y"))
    assert only_empty.unavailable == {"p": "it was empty in every sample"}
    assert only_empty["y"].high == 3.0
    later = calibrate(model, context([empty, {"past": x, "x": x}]), ("p", "y"), "percentile")
    assert (later["p"].low, later["y"].high) == (pytest.approx(-3, rel=0.01), pytest.approx(3, rel=0.01))


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("float16", np.float16), ("double", np.float64)])
def test_other_real_types_are_watched_as_float32(dtype, numpy_dtype):
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    half ({dtype}[2, 300] x) => ({dtype}[2, 300] y) {{ h = Add (x, x)  y = Neg (h) }}
    """
    # Their sum, 90000, is more than float16 can hold.
    feeds = [{"x": np.full((2, 300), 75, numpy_dtype)}]
    ranges = calibrate(parse(text), context(feeds), ("h",), "minmax", UINT8, (("y", 0),))
    assert ranges["h"].high == 150.0
    assert ranges["y"].low.tolist() == [-150.0, -150.0]


FAULTY = """
<ir_version: 8, opset_import: ["" : 17]>
faulty (float[4] x) => (float[4] y)
<float[1] one = {{1}}>
{{
    a = Neg (x)
    [log] b = Log (a)
    c = Add (b, one)
    {last}
}}
"""
REACHES, ABSORBED = "y = Mul (c, c)", "d = Exp (c)  z = IsNaN (d)  y = Where (z, one, d)"


@pytest.mark.parametrize(("value", "fault"), [(1.0, "NaN"), (0.0, "infinity")])
def test_what_is_not_finite_is_told_with_the_node_that_made_it(value, fault):
    good = np.full(4, -1, np.float32)
    bad = good.copy()
    bad[2] = value
    with pytest.raises(UserError) as caught:
        calibrate(parse(FAULTY.format(last=REACHES)), context([{"x": good}, {"x": bad}]), ("a", "c"))
    assert str(caught.value) == (
        f"calibration sample 1: tensor 'c' holds {fault}, made first by node 'log' (Log) in 'b'. Output 'y' is not "
        "finite either. Mend the sample, or the weights that lead there."
    )
    ranges = calibrate(parse(FAULTY.format(last=ABSORBED)), context([{"x": good}, {"x": bad}]), ("a", "c", "y"))
    assert ranges.unavailable == {
        "c": f"it holds {fault}, made first by node 'log' (Log) in 'b' on calibration sample 1"
    }
    assert sorted(ranges) == ["a", "y"]


def test_a_single_nan_among_many_elements_does_not_hide():
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    roots (float[1, 8, 56, 56] x) => (float[1, 8, 56, 56] y) { r = Sqrt (x)  y = Identity (r) }
    """
    for place in (0, 1, 7777, 8 * 56 * 56 - 1):
        x = np.random.default_rng(0).random((1, 8, 56, 56)).astype(np.float32)
        x.reshape(-1)[place] = -1.0
        with pytest.raises(UserError, match=r"tensor 'r' holds NaN, made first by node 'Sqrt->r' \(Sqrt\) in 'r'"):
            calibrate(parse(text), context([{"x": x}]), ("r",))


IMAGE_OPERATORS = """
<ir_version: 8, opset_import: ["" : {opset}]>
images (float[2, 8, 9, 9] x) => (float[2, 8, 9, 9] y)
<float least = {{0}}, float below = {{-1}}, float most = {{1}}>
{{
    root = {root} (x)
    relu = Relu (root)
    sigmoid = Sigmoid (root)
    clip = {clip}
    both = {both}
    y = Sum (relu, sigmoid, clip, both)
}}
"""
BY_ATTRIBUTE = {"clip": "Clip <min = 0.0, max = 1.0> (root)", "both": "Clip <min = -1.0, max = 1.0> (root)"}
BY_INPUT = {"clip": "Clip (root, least, most)", "both": "Clip (root, below, most)"}


@pytest.mark.parametrize(("opset", "clips"), [(9, BY_ATTRIBUTE), (17, BY_INPUT)])
def test_images_that_cannot_lie_below_zero_are_pooled_and_the_bounds_are_the_same(opset, clips):
    names = ["relu", "sigmoid", "clip", "both"]
    model = parse(IMAGE_OPERATORS.format(opset=opset, root="Identity", **clips))
    kinds = probes.kinds(model, names, frozenset({"x"}))
    values = probes.main_values(model)
    pooled = [name for name in names if reductions._is_image_not_below_zero(values[name], kinds[name])]
    assert pooled == ["relu", "sigmoid", "clip"]
    feeds = [{"x": np.random.default_rng(0).standard_normal((2, 8, 9, 9)).astype("f") * 3}]
    ranges = calibrate(model, context(feeds), tuple(names))
    for name, (array,) in fetched(model, names, feeds).items():
        assert ranges[name].high == pytest.approx(array.max())
        assert ranges[name].low == (0.0 if name != "both" else -1.0)


@pytest.mark.parametrize("name", ["sigmoid", "both"])
def test_a_single_nan_does_not_hide_from_pooling_either(name):
    model = parse(IMAGE_OPERATORS.format(opset=17, root="Sqrt", **BY_INPUT))
    x = np.random.default_rng(0).random((2, 8, 9, 9)).astype(np.float32)
    x[1, 3, 4, 5] = -1.0
    with pytest.raises(UserError, match=rf"tensor '{name}' holds NaN, made first by node 'Sqrt->root'"):
        calibrate(model, context([{"x": x}]), (name,))


def test_a_faulty_sample_is_counted_in_the_data_that_it_comes_from():
    feeds = [{"x": np.array([1, np.nan if number == 7 else 2, 3, 4], np.float32)} for number in range(10)]
    kept, held_back = split(open_samples(feeds, [InputSpec("x", "float32", (4,))]), 0.2)
    assert 7 in kept.indices
    assert held_back.indices[0] < 7
    with pytest.raises(UserError, match="calibration sample 7: input 'x' holds NaN"):
        calibrate(parse(FAULTY.format(last=REACHES)), context(kept), ("a",))


def test_a_faulty_sample_is_told_as_such():
    x = np.array([1, np.nan, 3, 4], np.float32)
    with pytest.raises(UserError, match="calibration sample 0: input 'x' holds NaN"):
        calibrate(parse(FAULTY.format(last=REACHES)), context([{"x": x}]), ("a",))


def test_a_sum_that_overflows_is_no_fault(monkeypatch):
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    mask (float[64] x) => (float[64] y) { a = Neg (x)  y = Add (x, x) }
    """
    looked_into = []
    original = activations._explain
    monkeypatch.setattr(activations, "_explain", lambda *a: looked_into.append(1) or original(*a))
    for x in (np.full(64, 3e38, np.float32), np.repeat([3e38, -3e38], 32).astype(np.float32)):
        ranges = calibrate(parse(text), context([{"x": x}]), ("a",))
        assert ranges["a"].low == np.float32(-3e38)
        assert ranges.unavailable == {}
        # Only infinities of both signs add up to NaN, which has to be looked into.
        assert not looked_into or x.min() < 0


def test_errors_of_the_user():
    model = cnn()
    with pytest.raises(UserError, match="--calib DATA"):
        calibrate(model, Context(), INNER)
    with pytest.raises(UserError, match="set is empty"):
        calibrate(model, context([]), INNER)
    with pytest.raises(UserError, match=r"no calibration method 'entropi'\. Did you mean 'entropy'"):
        calibrate(model, context(images()), INNER, "entropi")
    with pytest.raises(UserError, match="does not run on calibration sample 1: "):
        calibrate(model, context([images()[0], {"x": np.zeros((2, 3, 8, 8), np.float32)}]), INNER)


def test_progress_counts_runs_over_all_slices():
    calls = []
    told = context(images(3), calibration_memory=4096, progress=lambda *call: calls.append(call))
    calibrate(cnn(), told, INNER)
    assert calls == [*(("calibrate", done, 6) for done in range(6)), ("calibrate", 6, 6)]


def test_the_feeds_are_gone_through_lazily_and_outputs_released():
    alive = []

    class Lazy:
        def __len__(self):
            return 5

        def __iter__(self):
            for feed in images(5):
                alive.append(feed)
                yield feed
                alive.clear()

    reference = calibrate(cnn(), context(images(5)), INNER)
    assert calibrate(cnn(), context(Lazy()), INNER)["r"].high == reference["r"].high
    assert len(alive) <= 1


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("sample", [1, 50, 500])
def test_the_sample_drawn_inside_the_graph_is_the_one_drawn_from_the_tensor(axis, sample):
    model, feeds = cnn(), images(3)
    observed = [one for _, one in Watch(model, context(feeds), [Request("c", axis, sample)])]
    for one, array in zip(observed, fetched(model, ["c"], feeds)["c"], strict=True):
        expected = reductions.reduce(array, Request("c", axis, sample))
        np.testing.assert_allclose(one.low, expected.low, rtol=1e-5)
        if expected.sample.shape[-1] == sample:
            np.testing.assert_allclose(one.sample, expected.sample, rtol=1e-4, atol=1e-6)
        else:
            # Fewer elements than were asked for: each comes about equally often.
            assert one.sample.shape[-1] == sample
            rows = np.sort(one.sample.reshape(-1, sample))
            np.testing.assert_allclose(rows[:, 0], np.sort(expected.sample.reshape(len(rows), -1))[:, 0], atol=1e-5)
            counts = np.unique(rows[0], return_counts=True)[1]
            assert counts.max() <= np.ceil(sample / expected.sample.shape[-1]) + 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_what_its_observer_gives(method):
    model = cnn()
    # Larger than any sample, so that what is drawn inside the graph and from the tensor is the same.
    feeds = images(4, batch=32)
    ranges = calibrate(model, context(feeds), ("c", "r"), method, INT8, (("d", 1),))
    tensors = fetched(model, ["c", "r", "d"], feeds)
    for name, axis in (("c", None), ("r", None), ("d", 1)):
        observer = METHODS[method](axis)
        for array in tensors[name]:
            observer.update(array)
        low, high = observer.range(INT8)
        np.testing.assert_allclose(ranges[name].low, low, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(ranges[name].high, high, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_data_give_the_same_ranges_with_any_number_of_threads(method):
    feeds = images()
    one, two, again = (
        calibrate(cnn(), dataclasses.replace(context(feeds), threads=threads), INNER, method) for threads in (1, 2, 2)
    )
    for name in INNER:
        assert (one[name].low, one[name].high) == (two[name].low, two[name].high) == (again[name].low, again[name].high)


def test_sizes_follow_named_axes():
    model = cnn()
    kinds = probes.kinds(model, ["c", "f"], frozenset({"x"}))
    sizes = activations._Sizes(model, kinds, images(1)[0])
    assert sizes.bytes(images(1)[0]) == {"c": 2048, "f": 32}
    assert sizes.bytes(images(1, batch=3)[0])["c"] == 3072
