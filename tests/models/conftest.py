"""Each reference model is built and loaded into ONNX Runtime once for all tests."""

import functools

import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qgraph import models


@functools.cache
def _proto(name: str) -> onnx.ModelProto:
    return ir.to_proto(models.build(name))


@functools.cache
def _session(name: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(_proto(name).SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="session")
def proto():
    """Return name -> ModelProto."""
    return _proto


@pytest.fixture(scope="session")
def run():
    """Return (name, input array) -> logits of ONNX Runtime."""

    def run_model(name, array):
        session = _session(name)
        (logits,) = session.run(None, {session.get_inputs()[0].name: array})
        return logits

    return run_model
