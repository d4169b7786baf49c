"""What the documents show works as shown."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import registry
from qgraph.pipeline import Pipeline

ROOT = Path(__file__).resolve().parent.parent.parent


def code_blocks(document: str) -> list[str]:
    """Return the Python examples of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


def test_the_pass_that_contributors_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = code_blocks("CONTRIBUTING.md")
    (tmp_path / "documented_pass.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    documented = importlib.import_module("documented_pass")
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (float[N, 4] y, bool[N, 4] mask)
        {
            a = Dropout (x)
            b = Relu (a)
            y, mask = Dropout (b)
        }
    """)
    report = Pipeline([documented.DropDropout()]).run(model)
    assert [node.op_type for node in model.graph] == ["Identity", "Relu", "Dropout"]
    assert (report.changed, report.notes) == (1, ("1 Dropout removed",))
    assert [one.reason for one in report.skipped] == ["its mask is read"]


@pytest.mark.parametrize("kind", ["pass", "target"])
def test_the_readme_lists_every_name(kind: registry.Kind):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w-]+)` \|", readme, re.MULTILINE))
    assert set(registry.names(kind)) <= listed
    assert listed <= {*registry.names("pass"), *registry.names("target")}


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    numbers = ", ".join(map(str, np.random.default_rng(1).normal(size=32).round(3)))
    model = ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 8] x) => (float[N, 4] y) <float[8, 4] w = {{{numbers}}}> {{ y = MatMul (x, w) }}
    """)
    ir.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "samples.npz", x=x)
    names = {"x": x, "feeds": [{"x": x}]}
    for code in code_blocks("README.md"):
        exec(compile(code, "README.md", "exec"), names)
    assert names["outputs"][0].shape == (16, 4)
    assert (tmp_path / "smaller.onnx").is_file()
