"""Products come out the same on any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from qgraph.numerics import products


@pytest.mark.parametrize("shape", [(3, 5, 7), (60, 700, 700), (130, 600, 1025), (1, 700, 3000)])
def test_they_are_products(shape: tuple[int, int, int]):
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal(shape[:2]), rng.standard_normal(shape[1:])
    with products.steady():
        np.testing.assert_allclose(products.product(left, right), left @ right, atol=1e-10)
        square = products.gram(right)
        products.mirror(square)
        np.testing.assert_allclose(square, right.T @ right, atol=1e-9)


def test_the_number_of_threads_does_not_matter():
    program = """
import hashlib, numpy as np
from qgraph.numerics.products import gram, product, steady
rng = np.random.default_rng(0)
with steady():
    for shape in ((60, 700, 700), (130, 600, 1025), (2000, 400, 600)):
        for dtype in (np.float32, np.float64):
            left, right = rng.standard_normal(shape[:2]).astype(dtype), rng.standard_normal(shape[1:]).astype(dtype)
            print(hashlib.sha256(product(left, right).tobytes() + gram(right).tobytes()).hexdigest())
"""
    outputs = set()
    for threads in ("1", "2", "5"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment)
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_the_limit_is_lifted_when_the_last_one_leaves():
    before = products._threads()
    with products.steady():
        with pytest.raises(ZeroDivisionError), products.steady():
            raise ZeroDivisionError
        assert products._function("get_num_threads") is None or products._threads() == 1
    assert products._threads() == before
