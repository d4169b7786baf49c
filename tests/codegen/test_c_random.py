"""Property test: random integer models give the same integers as C, in the reference and in ONNX Runtime."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.runtime.reference import ReferenceSession
from qgraph.runtime.session import open_session

sys.path.insert(0, str(Path(__file__).parent))
from c_build import Library, needs_gcc, run_checked, run_onnx, sanitizers
from integer_models import random_integer_feeds, random_integer_model

MODELS = 40
# Optimised less: what costs is the compiler's time, and every kernel is compiled in full by other tests.
FLAGS = ("-std=c99", "-O1", "-Wall", "-Wextra", "-Werror")


@needs_gcc
@pytest.mark.parametrize("chunk", range(6))
def test_random_models(tmp_path: Path, chunk: int):
    models = {f"m{seed}": random_integer_model(seed) for seed in range(chunk * MODELS, (chunk + 1) * MODELS)}
    library = Library(models, tmp_path, FLAGS)
    for name, model in models.items():
        oracle, session = ReferenceSession(model), open_session(ir.to_proto(model).SerializeToString(), threads=1)
        for seed in range(2):
            feeds = random_integer_feeds(model, seed)
            runs = library.run(name, feeds), oracle.run(None, feeds), session.run(None, feeds)
            for value, found, reference, expected in zip(model.graph.outputs, *runs, strict=True):
                assert found.dtype == reference.dtype == expected.dtype
                np.testing.assert_array_equal(found, expected, err_msg=f"{name}: {value.name}")
                np.testing.assert_array_equal(found, reference, err_msg=f"{name}: {value.name}")


@needs_gcc
def test_random_models_under_the_sanitizers(tmp_path: Path):
    if not sanitizers(tmp_path):
        pytest.skip("gcc has no address sanitizer here")
    models = {f"s{seed}": random_integer_model(seed) for seed in range(1000, 1030)}
    feeds = {name: random_integer_feeds(model, 0) for name, model in models.items()}
    found = run_checked({name: (model, feeds[name]) for name, model in models.items()}, tmp_path)
    for name, model in models.items():
        for a, b in zip(found[name], run_onnx(model, feeds[name]), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
