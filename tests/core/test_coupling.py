"""Coupled dimensions: atoms on their own, operators one by one, and random graphs that are cut.

A cut is right if the smaller model runs and gives what the whole one gives with the removed indices of its constants
set to zero.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.analysis.coupling import Coupling, coupling, is_weight
from qgraph.analysis.cutting import cut
from qgraph.analysis.dimensions import Atom, Axis, Dimensions
from qgraph.pipeline import Context

# --- atoms ------------------------------------------------------------------------------------------------------------


def sizes(dimensions: Dimensions, axis: Axis) -> list[list[int]]:
    return [[atom.size for atom in term] for term in dimensions.resolved(axis).terms]


def test_an_axis_that_is_reshaped_becomes_a_product():
    some = Dimensions()
    whole = some.axis(12)
    heads, size = some.split(whole, [3, 4], "here") or []

    assert sizes(some, whole) == [[3, 4]]
    assert some.cut(whole, {some.atoms(heads)[0]: np.array([0, 2])}).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert some.cut(whole, {some.atoms(size)[0]: np.array([1])}).tolist() == [1, 5, 9]


def test_axes_that_are_joined_become_a_sum():
    some = Dimensions()
    one, other, whole = some.axis(2), some.axis(3), some.axis(5)
    some.unify(Axis((*one.terms, *other.terms)), whole, "here")

    assert sizes(some, whole) == [[2], [3]]
    assert some.cut(whole, {some.atoms(other)[0]: np.array([0, 2])}).tolist() == [0, 1, 2, 4]


def test_a_sum_whose_parts_overlap_is_refined():
    some = Dimensions()
    a, b, c, d = (some.axis(size) for size in (2, 4, 3, 3))
    some.unify(Axis((*a.terms, *b.terms)), Axis((*c.terms, *d.terms)), "here")

    assert sizes(some, a) == [[2]]
    assert sizes(some, b) == [[1], [3]] or sizes(some, b) == [[], [3]]
    assert some.atoms(d)[0] in some.atoms(b)


def test_a_shuffle_keeps_its_atoms_in_another_order():
    some = Dimensions()
    before = some.axis(6)
    groups, rest = some.split(before, [2, 3], "here") or []
    after = some.product([rest, groups])
    assert after is not None

    assert some.cut(after, {some.atoms(rest)[0]: np.array([0, 1])}).tolist() == [0, 1, 2, 3]
    assert some.cut(before, {some.atoms(rest)[0]: np.array([0, 1])}).tolist() == [0, 1, 3, 4]


def test_what_cannot_be_followed_is_frozen():
    some = Dimensions()
    one, other = some.axis(6), some.axis(6)
    some.split(one, [2, 3], "here")
    some.split(other, [3, 2], "there")
    some.unify(one, other, "'Reshape'")

    assert "in a way that cannot be followed" in some.atoms(one)[0].frozen
    assert some.atoms(other)[0].frozen


def test_freezing_reaches_what_is_the_same_before_and_after():
    some = Dimensions()
    one, other, third = some.axis(6), some.axis(6), some.axis(6)
    some.unify(one, other, "here")
    some.freeze(other, "because")
    some.unify(third, one, "here")
    factors = some.split(third, [2, 3], "here") or []

    assert [atom.frozen for axis in (one, third, *factors) for atom in some.atoms(axis)] == ["because"] * 6


def test_an_axis_that_is_split_into_a_sum_stays_frozen():
    some = Dimensions()
    whole, one, other = some.axis(5), some.axis(2), some.axis(3)
    some.freeze(whole, "because")
    some.unify(whole, Axis((*one.terms, *other.terms)), "here")

    assert sizes(some, whole) == [[2], [3]]
    assert [atom.frozen for axis in (one, other) for atom in some.atoms(axis)] == ["because"] * 2


def test_a_product_is_split_where_its_inner_factors_end():
    some = Dimensions()
    slow, fast, one, other = some.axis(4), some.axis(3), some.axis(3), some.axis(9)
    whole = some.product([slow, fast])
    assert whole is not None
    some.unify(whole, Axis((*one.terms, *other.terms)), "here")

    assert sizes(some, slow) == [[], [3]]
    assert sizes(some, other) == [[3, 3]]
    assert not any(atom.frozen for axis in (slow, fast, one, other) for atom in some.atoms(axis))
    gone = some.cut(whole, {some.atoms(slow)[0]: np.array([0, 2])})
    assert gone is not None
    assert gone.tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11]


def test_a_product_that_ends_elsewhere_is_frozen_whole():
    some = Dimensions()
    slow, fast, one, other = some.axis(2), some.axis(3), some.axis(4), some.axis(2)
    whole = some.product([slow, fast])
    assert whole is not None
    some.unify(whole, Axis((*one.terms, *other.terms)), "'Concat'")

    assert sizes(some, whole) == [[2, 3]]
    assert all("cannot be followed" in atom.frozen for axis in (slow, fast, one, other) for atom in some.atoms(axis))


def test_a_product_of_an_atom_with_itself_is_no_sum():
    some = Dimensions()
    twice, one, other = some.axis(4), some.axis(8), some.axis(8)
    whole = some.product([twice, twice])
    assert whole is not None
    some.unify(whole, Axis((*one.terms, *other.terms)), "'Concat'")

    assert sizes(some, whole) == [[4, 4]]
    assert all("cannot be followed" in atom.frozen for axis in (twice, one, other) for atom in some.atoms(axis))


# --- graphs -----------------------------------------------------------------------------------------------------------


class Builder:
    """Writes a graph node by node, with random constants."""

    def __init__(self, seed: int, dims: list[int | str]) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.input = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, dims)

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant((self.random.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

    def node(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        names = [f"v{len(self.nodes)}" + (f"_{index}" if index else "") for index in range(outputs)]
        self.nodes.append(onnx.helper.make_node(op_type, inputs, names, name=f"n{len(self.nodes)}", **attributes))
        return names[0]

    def model(self, *outputs: str) -> ir.Model:
        infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
        graph = onnx.helper.make_graph(self.nodes, "g", [self.input], infos, self.constants)
        opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
        return ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, feeds)


def weights_of(found: Coupling) -> dict[Atom, list[str]]:
    """Return the atoms that constants have, each with the names of these."""
    atoms: dict[Atom, list[str]] = {}
    for value, axes in found.axes.items():
        for axis in axes if is_weight(value) else ():
            for atom in [] if axis is None else found.dimensions.atoms(axis):
                atoms.setdefault(atom, []).append(str(value.name))
    return atoms


def masked(model: ir.Model, found: Coupling, keep: dict[Atom, np.ndarray]) -> ir.Model:
    """Return a copy whose removed indices are zero."""
    copy = model.clone()
    for value, axes in found.axes.items():
        if not is_weight(value) or value.const_value is None or value.dtype != ir.DataType.FLOAT:
            continue
        array = np.array(value.const_value.numpy())
        for index, axis in enumerate(axes):
            indices = None if axis is None else found.dimensions.cut(axis, keep)
            if indices is not None:
                gone = np.setdiff1d(np.arange(array.shape[index]), indices)
                array[(slice(None),) * index + (gone,)] = 0
        copy.graph.initializers[str(value.name)].const_value = ir.tensor(array, name=value.name)
    return copy


def assert_cut_is_masking(model: ir.Model, feeds: dict[str, np.ndarray], seed: int = 0) -> list[Atom]:
    """Cut something of every atom that is free; return those atoms."""
    random = np.random.default_rng(seed)
    found = coupling(model, Context())
    free = [atom for atom in weights_of(found) if not atom.frozen and atom.size > 1]
    keep = {atom: np.sort(random.permutation(atom.size)[: random.integers(1, atom.size)]) for atom in free}
    expected = run(masked(model, found, keep), feeds)
    before = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value)
    cut(model, found, keep)
    assert qgraph.ir.check(model) is None
    after = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value)
    assert (after < before) == bool(free)
    for one, other in zip(expected, run(model, feeds), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
    return free


class RandomNetwork:
    """A convolutional network of random blocks over [n, channels, 8, 8]."""

    def __init__(self, seed: int) -> None:
        self.build = Builder(seed, ["n", 3, 8, 8])
        self.random = self.build.random
        self.x, self.channels = self.conv("x", 3, 8), 8

    def conv(self, x: str, width: int, outputs: int, groups: int = 1, size: int = 3) -> str:
        weight, bias = self.build.weight(outputs, width // groups, size, size), self.build.weight(outputs)
        pads = [size // 2] * 4
        return self.build.node("Conv", x, weight, bias, group=groups, pads=pads)

    def plain(self) -> None:
        outputs = int(self.random.choice([4, 8, 12]))
        self.x, self.channels = self.build.node("Relu", self.conv(self.x, self.channels, outputs)), outputs

    def normalized(self) -> None:
        size = self.channels
        vectors = [self.build.weight(size), self.build.weight(size), self.build.weight(size)]
        variance = self.build.constant(self.random.uniform(0.5, 2, size).astype(np.float32))
        self.x = self.build.node("BatchNormalization", self.x, *vectors, variance)

    def depthwise(self) -> None:
        self.x = self.conv(self.x, self.channels, 2 * self.channels, groups=self.channels)
        self.channels *= 2
        self.plain()

    def grouped(self) -> None:
        self.x = self.conv(self.x, self.channels, self.channels, groups=2)

    def residual(self) -> None:
        inner = self.build.node("Relu", self.conv(self.x, self.channels, 6))
        back = self.conv(inner, 6, self.channels)
        self.x = self.build.node("Add", back, self.x)

    def joined(self) -> None:
        one, other = self.conv(self.x, self.channels, 4), self.conv(self.x, self.channels, 8, size=1)
        self.x, self.channels = self.build.node("Concat", one, other, self.x, axis=1), 12 + self.channels

    def split(self) -> None:
        half = self.channels // 2
        sizes = self.build.constant(np.array([half, self.channels - half]))
        first = self.build.node("Split", self.x, sizes, outputs=2, axis=1)
        changed = self.conv(first, half, half)
        self.x = self.build.node("Concat", f"{first}_1", changed, axis=1)

    def shuffled(self) -> None:
        half = self.channels // 2
        apart = self.build.node("Reshape", self.x, self.build.constant(np.array([0, 2, half, 8, 8])))
        turned = self.build.node("Transpose", apart, perm=[0, 2, 1, 3, 4])
        self.x = self.build.node("Reshape", turned, self.build.constant(np.array([0, self.channels, 8, 8])))

    def gated(self) -> None:
        pooled = self.build.node("GlobalAveragePool", self.x)
        small = self.build.node("Relu", self.conv(pooled, self.channels, 4, size=1))
        gate = self.build.node("HardSigmoid", self.conv(small, 4, self.channels, size=1))
        self.x = self.build.node("Mul", self.x, gate)

    def padded(self) -> None:
        pads = self.build.constant(np.array([0, 1, 0, 0, 0, 3, 0, 0]))
        self.x, self.channels = self.build.node("Pad", self.x, pads), self.channels + 4

    def scaled(self) -> None:
        self.x = self.build.node("Mul", self.x, self.build.weight(self.channels, 1, 1))
        self.x = self.build.node("PRelu", self.x, self.build.weight(self.channels, 1, 1))

    def finish(self) -> ir.Model:
        pooled = self.build.node("Flatten", self.build.node("GlobalAveragePool", self.x))
        hidden = self.build.node("Gemm", pooled, self.build.weight(10, self.channels), transB=1)
        table = self.build.weight(10, 5)
        return self.build.model(self.build.node("MatMul", self.build.node("Tanh", hidden), table))


BLOCKS = ("plain", "normalized", "depthwise", "grouped", "residual", "joined", "split", "shuffled", "gated", "padded")


@pytest.mark.parametrize("seed", range(60))
def test_random_networks(seed: int):
    network = RandomNetwork(seed)
    for name in network.random.choice([*BLOCKS, "scaled"], size=int(network.random.integers(1, 7))):
        getattr(network, str(name))()
    x = network.random.normal(size=(2, 3, 8, 8)).astype(np.float32)

    free = assert_cut_is_masking(network.finish(), {"x": x}, seed)

    assert free


def attention(build: Builder, x: str, heads: int, groups: int, size: int, *, fused: str = "") -> str:
    """Attention over [n, s, width] with `heads` query heads, `groups` key and value heads, as exporters write it."""
    width = heads * size
    parts = [build.node("MatMul", x, build.weight(width, count * size)) for count in (heads, groups, groups)]
    if fused == "MultiHeadAttention":
        build.nodes.append(
            onnx.helper.make_node(fused, parts, ["mha"], name="mha", domain="com.microsoft", num_heads=heads)
        )
        return "mha"
    if fused == "GroupQueryAttention":
        lengths = [build.constant(np.array([4, 4], np.int32)), build.constant(np.array([5], np.int32))]
        counts = {"num_heads": heads, "kv_num_heads": groups}
        given = [*parts, "", "", *lengths]
        build.nodes.append(onnx.helper.make_node(fused, given, ["gqa"], name="gqa", domain="com.microsoft", **counts))
        return "gqa"
    if fused == "Attention":
        return build.node(fused, *parts, q_num_heads=heads, kv_num_heads=groups)
    split = []
    for part, count in zip(parts, (heads, groups, groups), strict=True):
        apart = build.node("Reshape", part, build.constant(np.array([0, 0, count, size])))
        one = build.node("Transpose", apart, perm=[0, 2, 1, 3])
        if count < heads and not fused:
            wide = build.node("Unsqueeze", one, build.constant(np.array([2])))
            shape = build.constant(np.array([1, 1, heads // count, 1, 1]))
            one = build.node(
                "Reshape", build.node("Expand", wide, shape), build.constant(np.array([0, heads, -1, size]))
            )
        split.append(one)
    query, key, value = split
    if fused:
        mixed = build.node("Attention", query, key, value)
        turned = build.node("Transpose", mixed, perm=[0, 2, 1, 3])
        return build.node("Reshape", turned, build.constant(np.array([0, 0, width])))
    scores = build.node("MatMul", query, build.node("Transpose", key, perm=[0, 1, 3, 2]))
    mixed = build.node("MatMul", build.node("Softmax", scores, axis=-1), value)
    return build.node(
        "Reshape", build.node("Transpose", mixed, perm=[0, 2, 1, 3]), build.constant(np.array([0, 0, width]))
    )


@pytest.mark.parametrize(
    ("heads", "groups", "fused"),
    [
        (4, 4, ""),
        (6, 2, ""),
        (4, 4, "MultiHeadAttention"),
        (4, 4, "GroupQueryAttention"),
        (6, 2, "GroupQueryAttention"),
        (4, 4, "Attention"),
        (6, 2, "Attention"),
        (4, 4, "Attention by heads"),
        (6, 2, "Attention by heads"),
    ],
)
def test_heads_are_cut_whole(heads: int, groups: int, fused: str):
    build = Builder(heads, ["n", "s", heads * 8])
    mixed = attention(build, "x", heads, groups, 8, fused=fused)
    out = build.node("MatMul", mixed, build.weight(heads * 8, heads * 8))
    normed = build.node("LayerNormalization", build.node("Add", out, "x"), build.weight(heads * 8))
    model = build.model(normed)
    x = build.random.normal(size=(2, 5, heads * 8)).astype(np.float32)

    free = assert_cut_is_masking(model, {"x": x})

    assert groups in [atom.size for atom in free]
    if heads > groups:
        assert heads // groups in [atom.size for atom in free]


@pytest.mark.parametrize(("op_type", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_recurrent_layers(op_type: str, gates: int, direction: str):
    hidden, count = 6, 2 if direction == "bidirectional" else 1
    build = Builder(1, ["s", "n", 5])
    inner = build.node("MatMul", "x", build.weight(5, 7))
    given = [build.weight(count, gates * hidden, 7), build.weight(count, gates * hidden, hidden)]
    bias = build.weight(count, 2 * gates * hidden)
    layer = build.node(op_type, inner, *given, bias, hidden_size=hidden, direction=direction)
    turned = build.node("Transpose", layer, perm=[0, 2, 1, 3])
    flat = build.node("Reshape", turned, build.constant(np.array([0, 0, count * hidden])))
    model = build.model(build.node("MatMul", flat, build.weight(count * hidden, 3)))
    x = build.random.normal(size=(4, 2, 5)).astype(np.float32)

    free = assert_cut_is_masking(model, {"x": x})

    assert sorted(atom.size for atom in free if atom.size > 2) == [6, 7]


def reason(model: ir.Model, weight: str, axis: int) -> str:
    found = coupling(model, Context())
    return " ".join(atom.frozen for atom in found.atoms(model.graph.initializers[weight], axis))


def test_what_is_frozen_says_why():
    build = Builder(0, ["n", 4])
    first = build.node("MatMul", "x", build.weight(4, 6))
    summed = build.node("Softmax", first, axis=-1)
    second = build.node("MatMul", summed, build.weight(6, 8))
    sorted_ = build.node("TopK", second, build.constant(np.array([3])), outputs=2)
    model = build.model(sorted_)

    assert reason(model, "c0", 0) == "'x' is an input of the model"
    assert reason(model, "c0", 1) == "'n1' (Softmax) sums over it"
    assert reason(model, "c1", 1) == "'n3' (TopK) is not understood"


def test_a_weight_of_two_layers_is_cut_for_both():
    build = Builder(0, ["n", 4])
    first = build.node("MatMul", "x", build.weight(4, 6))
    shared = build.weight(6, 6)
    second = build.node("MatMul", build.node("Relu", first), shared)
    third = build.node("MatMul", build.node("Relu", second), shared)
    model = build.model(build.node("MatMul", third, build.weight(6, 2)))

    free = assert_cut_is_masking(model, {"x": np.ones((2, 4), np.float32)})

    assert [atom.size for atom in free] == [6]


def test_shapes_that_are_computed_in_part_follow():
    build = Builder(0, ["n", "s", 8])
    inner = build.node("MatMul", "x", build.weight(8, 12))
    shape = build.node("Shape", "x")
    two = build.node("Slice", shape, build.constant(np.array([0])), build.constant(np.array([2])))
    apart = build.node("Reshape", inner, build.node("Concat", two, build.constant(np.array([3, 4])), axis=0))
    moved = build.node("Transpose", apart, perm=[0, 1, 3, 2])
    back = build.node("Reshape", moved, build.node("Concat", two, build.constant(np.array([12])), axis=0))
    model = build.model(build.node("MatMul", back, build.weight(12, 2)))
    x = build.random.normal(size=(2, 3, 8)).astype(np.float32)

    free = assert_cut_is_masking(model, {"x": x}, seed=3)

    assert sorted(atom.size for atom in free) == [3, 4]


def test_a_size_that_a_reshape_copies_follows_what_it_is_copied_from():
    """[6, 9, 3] becomes [18, 9]: the 9 is copied from another axis than the one whose indices it holds."""
    build = Builder(0, ["n", 8])
    apart = build.node(
        "Reshape", build.node("MatMul", "x", build.weight(8, 162)), build.constant(np.array([0, 6, 9, 3]))
    )
    moved = build.node("Reshape", apart, build.constant(np.array([0, 18, 0])))
    flat = build.node("Reshape", moved, build.constant(np.array([0, 162])))
    model = build.model(build.node("MatMul", flat, build.weight(162, 3)))
    x = build.random.normal(size=(2, 8)).astype(np.float32)

    for seed in range(4):
        free = assert_cut_is_masking(model.clone(), {"x": x}, seed=seed)

    assert sorted(atom.size for atom in free) == [3, 6]


def test_a_bad_cut_is_refused():
    build = Builder(0, ["n", 4])
    model = build.model(build.node("MatMul", build.node("MatMul", "x", build.weight(4, 6)), build.weight(6, 2)))
    found = coupling(model, Context())
    (free,) = found.atoms(model.graph.initializers["c0"], 1)
    (frozen,) = found.atoms(model.graph.initializers["c0"], 0)

    with pytest.raises(ValueError, match="is an input of the model"):
        cut(model, found, {frozen: np.array([0])})
    for indices in ([], [0, 6], [1, 0]):
        with pytest.raises(ValueError, match="indices that rise from 0 to 5"):
            cut(model, found, {free: np.array(indices)})
