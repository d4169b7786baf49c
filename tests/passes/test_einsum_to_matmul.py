"""`einsum-to-matmul` against numpy's einsum, and what it leaves alone."""

from __future__ import annotations

import random

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qgraph.pipeline import Pipeline
from qgraph.runtime.session import open_session

SHAPES = list[list[int | str]]


def einsum(equation: str, shapes: SHAPES) -> ir.Model:
    names = [f"x{index}" for index in range(len(shapes))]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Einsum", names, ["y"], equation=equation)],
        "g",
        [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in zip(names, shapes, strict=True)],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
    )
    imports = [onnx.helper.make_opsetid("", 21)]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def assert_same(equation: str, arrays: list[np.ndarray], shapes: SHAPES | None = None) -> set[str]:
    """Rewrite, compare with numpy, and return the operators that it took."""
    model = einsum(equation, [list(array.shape) for array in arrays] if shapes is None else shapes)
    assert Pipeline.parse("einsum-to-matmul").run(model).changed == 1, equation
    Pipeline.parse("infer-shapes").run(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    session = open_session(ir.to_proto(model).SerializeToString(), threads=1, optimise=False)
    (found,) = session.run(None, {f"x{index}": array for index, array in enumerate(arrays)})
    expected = np.einsum(equation, *(array.astype(np.float64) for array in arrays))
    assert found.shape == expected.shape, equation
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * (1 + np.abs(expected).max()), err_msg=equation)
    return {node.op_type for node in model.graph}


@pytest.mark.parametrize("chunk", range(4))
def test_random_equations(chunk: int):
    for seed in range(chunk * 25, (chunk + 1) * 25):
        chosen, numbers = random.Random(seed), np.random.default_rng(seed)
        sizes = {letter: chosen.choice([1, 2, 3, 4]) for letter in "abcde"}
        factors = ["".join(chosen.sample("abcde", chosen.randint(1, 4))) for _ in range(chosen.choice([1, 2, 2, 3]))]
        used = sorted(set("".join(factors)))
        dots = "..." if chosen.random() < 0.3 else ""
        arrays = []
        for factor in factors:
            more = [2, 3][chosen.randint(0, 2) :] if dots else []
            arrays.append(numbers.normal(size=[*more, *(sizes[one] for one in factor)]).astype(np.float32))
        result = dots + "".join(chosen.sample(used, chosen.randint(0, min(4, len(used)))))
        assert_same(",".join(dots + factor for factor in factors) + "->" + result, arrays)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("equation", ["ij, jk", "ba", "...a,...a", "i,i", "ij,jk,kl"])
def test_a_result_that_is_not_written(equation: str):
    ranks = [1 if part in ("i", "...a") else 2 for part in equation.replace(" ", "").split(",")]
    assert_same(equation, [normal(*[3] * rank) for rank in ranks])


def test_nothing_is_reshaped_that_matmul_takes_as_it_is():
    assert assert_same("bik,bkj->bij", [normal(2, 3, 4), normal(2, 4, 5)]) == {"MatMul"}
    assert assert_same("bsd,de->bse", [normal(2, 3, 4), normal(4, 5)]) == {"MatMul"}
    assert assert_same("de,bsd->bse", [normal(4, 5), normal(2, 3, 4)]) == {"MatMul"}
    assert assert_same("bij,bij->bij", [normal(2, 3, 4), normal(2, 3, 4)]) == {"Mul"}


def test_sizes_that_are_not_known():
    assert_same("bshd,hde->bse", [normal(2, 3, 4, 5), normal(4, 5, 6)], [["n", "s", 4, 5], [4, 5, 6]])
    assert_same("bqhd,bkhd->bhqk", [normal(2, 3, 4, 5), normal(2, 7, 4, 5)], [["n", "q", 4, 5], ["n", "k", 4, 5]])


@pytest.mark.parametrize(
    ("equation", "shapes", "reason"),
    [
        ("ii->i", [[4, 4]], "diagonal"),
        ("bahd,bhde->bae", [["n", "a", "h", "d"], ["n", "h", "d", 6]], "several sizes are not known"),
        ("ij,jk->ik", [[4, 4]], "has 2 factors, and the node 1"),
        ("ijk->k", [[4, 4]], "does not fit 2 axes"),
        ("ij,jk->iz", [[4, 4], [4, 4]], "is not an equation"),
        ("ij,jk->ik", [[4, 3], [4, 4]], "'j' has several sizes"),
    ],
)
def test_what_stays(equation: str, shapes: SHAPES, reason: str):
    model = einsum(equation, shapes)
    before = ir.to_onnx_text(model)
    report = Pipeline.parse("einsum-to-matmul").run(model)
    assert report.changed == 0
    assert reason in report.parts[0].skipped[0].reason
    assert ir.to_onnx_text(model) == before
