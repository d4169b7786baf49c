"""Real transformers in float, as exporters wrote them: what cpu-fp32 fuses, and that the values stay."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph.pipeline import Context
from qgraph.runtime.session import open_session
from qgraph.targets.cpu import CpuFp32
from qgraph.targets.cpu_fp16 import CpuFp16

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import data  # noqa: E402 - the benchmark's own module, which is in no package

FORMS = ("dynamo_eager", "dynamo_sdpa", "legacy_eager", "legacy_sdpa")
EQUAL = 1e-4


def compiled(source: Path, target: CpuFp32, folder: Path) -> tuple[Path, Counter[str], Counter[str]]:
    """Return the file, its operators, and those that the runtime really runs."""
    one = qgraph.ir.load(source)
    for part in (target.prepare_passes(), target.compress_passes(one, Context()), target.lower_passes()):
        part.run(one)
    target.lower(one, folder)
    open_session(folder / "model.onnx", optimised_path=folder / "optimised.onnx")
    return folder / "model.onnx", operators(one), operators(qgraph.ir.load(folder / "optimised.onnx"))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in qgraph.ir.walk(model))


def difference(one: Path, other: Path, feed: dict[str, np.ndarray]) -> float:
    found, wanted = (open_session(path).run(None, feed)[0] for path in (one, other))
    return float(np.abs(found - wanted).max())


@pytest.mark.parametrize("form", FORMS)
def test_an_encoder_ends_in_the_same_operators_from_every_exporter(form: str, assets: Path, tmp_path: Path):
    task = data.TASKS[f"minilm_{form}"]
    if not task.is_assembled():
        pytest.skip(f"minilm_{form} is not in {data.cache_folder()}; benchmarks/run.py --only minilm puts it there")
    path, written, run = compiled(task.model(), CpuFp32(), tmp_path)
    assert (written["Attention"], written["Gelu"], written["LayerNormalization"]) == (6, 6, 13)
    assert (written["Gemm"], written["MatMul"]) == (30, 6), "only the keys have no bias"
    assert not {"Softmax", "Transpose", "Erf"} & set(written)
    assert not {"SkipLayerNormalization", "BiasGelu"} & set(run)
    random = np.random.default_rng(0)
    mask = np.ones((2, 12), np.int64)
    mask[1, 7:] = 0
    feed = {"input_ids": random.integers(5, 20000, (2, 12)), "attention_mask": mask}
    assert difference(path, task.model(), feed) <= EQUAL


def test_a_decoder_gets_grouped_attention_rotations_and_norms(assets: Path, tmp_path: Path):
    source = assets / "stories260k" / "stories260K.onnx"
    path, written, _ = compiled(source, CpuFp32(), tmp_path)
    assert (written["Attention"], written["RotaryEmbedding"], written["RMSNormalization"]) == (5, 10, 11)
    assert not {"Softmax", "Neg", "Pow"} & set(written)
    feed = {"input_ids": np.random.default_rng(0).integers(0, 500, (2, 40))}
    assert difference(path, source, feed) <= EQUAL


def test_half_weights_take_half_the_file_and_no_operator_at_run_time(assets: Path, tmp_path: Path):
    source = assets / "stories260k" / "stories260K.onnx"
    path, written, run = compiled(source, CpuFp16(), tmp_path)
    assert path.stat().st_size < 0.55 * source.stat().st_size
    assert written["Cast"] > run["Cast"] == 0
    feed = {"input_ids": np.random.default_rng(0).integers(0, 500, (2, 40))}
    assert difference(path, source, feed) <= 0.05
