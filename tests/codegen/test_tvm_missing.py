"""Compiling where Apache TVM is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from qgraph.codegen import tvm_library
from qgraph.errors import UserError


def test_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "tvm", None)
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (int32[3] x) => (int32[3] y) { y = Neg (x) }'
    )
    for attempt in (lambda: tvm_library.emit_so(model, tmp_path), lambda: tvm_library.TvmSession(tmp_path)):
        with pytest.raises(UserError, match=r"pip install 'qgraph-compiler\[tvm\]'"):
            attempt()
