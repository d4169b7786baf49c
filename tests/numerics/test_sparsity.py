"""Sparsity: masks against slow loops, SparseGPT against the published loop, and the fit against least squares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph.numerics.gptq import gptq
from qgraph.numerics.hessian import output_error
from qgraph.numerics.sparsity import Pattern, follows, mask_of, parse_pattern, sparse_gptq
from qgraph.numerics.weights import WeightScheme

TWO_OF_FOUR = Pattern("neighbours")


def problem(outputs: int = 24, inputs: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(400, inputs)) @ (np.eye(inputs) + 0.3 * rng.normal(size=(inputs, inputs)) / 4)
    rows *= np.exp(rng.normal(size=inputs))
    return rng.normal(size=(outputs, inputs)).astype(np.float32), 2 * rows.T @ rows / len(rows)


def published(weight: np.ndarray, hessian: np.ndarray, kept: int, of: int, damping: float = 0.01) -> np.ndarray:
    """SparseGPT as its paper's algorithm 1 has it, with an inverse and its Cholesky factor, one column at a time."""
    inputs = weight.shape[1]
    damped = hessian + damping * np.mean(hessian.diagonal()) * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    work, mask = weight.astype(np.float64).copy(), np.ones(weight.shape, bool)
    for column in range(inputs):
        if column % of == 0:
            group = slice(column, column + of)
            saliency = np.square(work[:, group]) / np.square(upper.diagonal()[group])
            for row in range(len(weight)):
                mask[row, column + np.argsort(saliency[row], kind="stable")[: of - kept]] = False
        quantized = np.where(mask[:, column], work[:, column], 0)
        error = (work[:, column] - quantized) / upper[column, column]
        work[:, column:] -= np.outer(error, upper[column, column:])
        work[:, column] = quantized
    return work


@pytest.mark.parametrize("outputs", [3, 24])
def test_the_loop_is_the_published_one(outputs: int):
    weight, hessian = problem(outputs)

    found = sparse_gptq(weight, hessian, TWO_OF_FOUR, fits=0, block=16)

    np.testing.assert_allclose(found.weight, published(weight, hessian, 2, 4), atol=2e-3)
    assert follows(found.weight, TWO_OF_FOUR)


def test_the_fit_lowers_the_error_below_the_published_loops():
    weight, hessian = problem()
    loop = output_error(weight, published(weight, hessian, 2, 4), hessian)

    found = sparse_gptq(weight, hessian, TWO_OF_FOUR)

    assert output_error(weight, found.weight, hessian) < 0.97 * loop
    assert (found.weight[~found.mask] == 0).all()


def test_the_fit_is_that_of_least_squares():
    weight, hessian = problem(4, 16)
    found = sparse_gptq(weight, hessian, TWO_OF_FOUR, damping=1e-9, fits=200)

    for row, stays, fitted in zip(weight, found.mask, found.weight, strict=True):
        best = np.linalg.solve(hessian[np.ix_(stays, stays)], hessian[stays] @ row)
        np.testing.assert_allclose(fitted[stays], best, rtol=2e-2, atol=2e-2)


def test_sparsegpt_beats_wanda_beats_magnitude():
    weight, hessian = problem(64)
    scores = {"magnitude": np.abs(weight), "wanda": np.abs(weight) * np.sqrt(hessian.diagonal())}
    errors = {
        name: output_error(weight, np.where(mask_of(score, TWO_OF_FOUR), weight, 0), hessian)
        for name, score in scores.items()
    }
    errors["sparsegpt"] = output_error(weight, sparse_gptq(weight, hessian, TWO_OF_FOUR).weight, hessian)

    assert errors["sparsegpt"] < 0.7 * errors["wanda"]
    assert errors["wanda"] < errors["magnitude"]


def test_zeros_and_four_bits_in_one_sweep():
    weight, hessian = problem(64, 128)
    scheme = WeightScheme("int", 4, 32, symmetric=False)
    first = published(weight, hessian, 2, 4)
    second = gptq(first.astype(np.float32), hessian, scheme, order="none", clip="minmax", refine=0)
    in_sequence = np.where(first == 0, 0, second.quantized.dequantize())

    found = sparse_gptq(weight, hessian, TWO_OF_FOUR, scheme=scheme)

    assert found.quantized is not None
    np.testing.assert_array_equal(found.quantized.dequantize(), found.weight)
    assert follows(found.weight, TWO_OF_FOUR)
    assert output_error(weight, found.weight, hessian) < 0.8 * output_error(weight, in_sequence, hessian)
    plain = sparse_gptq(weight, hessian, TWO_OF_FOUR, scheme=scheme, refine=0)
    assert output_error(weight, found.weight, hessian) < output_error(weight, plain.weight, hessian)


def test_a_mask_that_was_chosen_stays():
    weight, hessian = problem()
    mask = mask_of(np.abs(weight), TWO_OF_FOUR)

    found = sparse_gptq(weight, hessian, TWO_OF_FOUR, mask=mask)

    np.testing.assert_array_equal(found.mask, mask)
    assert (found.weight[~mask] == 0).all()


def test_inputs_that_were_never_seen_go_first():
    weight, hessian = problem()
    hessian = np.diag(np.where(np.arange(64) % 2, np.mean(hessian.diagonal()), 0.0))

    found = sparse_gptq(weight, hessian, TWO_OF_FOUR)

    assert not found.mask[:, ::2].any()
    np.testing.assert_allclose(found.weight[:, 1::2], weight[:, 1::2], atol=1e-3)


@given(st.integers(1, 5), st.integers(1, 12), st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8)]), st.integers(0, 99))
def test_masks_against_a_slow_loop(outputs: int, inputs: int, pattern: tuple[int, int], seed: int):
    scores = np.random.default_rng(seed).integers(0, 4, (outputs, inputs)).astype(float)
    kept, of = pattern

    mask = mask_of(scores, Pattern("neighbours", kept, of))

    for row, stays in zip(scores, mask, strict=True):
        for start in range(0, inputs, of):
            group = list(row[start : start + of])
            count = kept if len(group) == of else -(-len(group) * kept // of)
            ranked = sorted(range(len(group)), key=lambda index: (-group[index], index))
            assert [index for index in range(len(group)) if stays[start + index]] == sorted(ranked[:count])


def test_shares_of_the_matrix_of_each_output_and_of_tiles():
    scores = np.arange(64.0).reshape(8, 8)

    whole = mask_of(scores, Pattern("unstructured", share=0.5))
    each = mask_of(scores, Pattern("unstructured", share=0.5), by_output=True)
    tiles = mask_of(scores, Pattern("block", share=0.5))

    assert whole.sum() == each.sum() == tiles.sum() == 32
    assert whole[4:].all()
    assert each[:, 4:].all()
    assert tiles[4:].all()


@pytest.mark.parametrize(
    ("text", "message"),
    [("4:4", "keeps none or all"), ("0:4", "keeps none or all"), ("half", "there is no pattern 'half'")],
)
def test_a_pattern_that_there_is_not_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text, 0.5)


def test_a_share_of_nothing_or_all_is_refused():
    for ratio in (0.0, 1.0):
        with pytest.raises(ValueError, match="not between 0 and 1"):
            parse_pattern("unstructured", ratio)
