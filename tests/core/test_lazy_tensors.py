"""Tensors computed while a file is written: in order, once, few at a time, and cleanly when something fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph.ir
from qgraph import lazy_tensors
from qgraph.lazy_tensors import evaluated, joint_tensors


class Counted:
    """Computes two tensors together, and counts how often and how many at a time."""

    running = 0
    most = 0
    lock = threading.Lock()

    def __init__(self, number: int) -> None:
        self.number = number
        self.calls = 0

    def __call__(self) -> list[ir.TensorProtocol]:
        self.calls += 1
        with Counted.lock:
            Counted.running += 1
            Counted.most = max(Counted.most, Counted.running)
        time.sleep(0.002 * (self.number % 3))
        with Counted.lock:
            Counted.running -= 1
        return [ir.tensor(np.full((8, 40), self.number, np.float32)), ir.tensor(np.full(300, self.number, np.uint8))]


SPECS = [(ir.DataType.FLOAT, (8, 40)), (ir.DataType.UINT8, (300,))]


def tensors_of(computations: list[Counted]) -> list[ir.TensorProtocol]:
    found: list[ir.TensorProtocol] = [ir.tensor(np.arange(5))]
    for computation in computations:
        found += joint_tensors(computation, SPECS)
    return [*found, qgraph.ir.lazy(lambda: np.ones((3, 3)), ir.DataType.DOUBLE, (3, 3))]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_in_their_order_and_computed_once(threads: int):
    computations = [Counted(number) for number in range(9)]
    results = list(evaluated(tensors_of(computations), threads=threads))
    assert [one.calls for one in computations] == [1] * 9
    assert [tensor.numpy().reshape(-1)[0] for tensor in results[1:-1:2]] == list(range(9))
    assert [tensor.dtype for tensor in results[2:-1:2]] == [ir.DataType.UINT8] * 9
    np.testing.assert_array_equal(results[-1].numpy(), np.ones((3, 3)))


def test_few_are_in_memory(monkeypatch):
    Counted.most = 0
    monkeypatch.setattr(lazy_tensors, "IN_FLIGHT", 1)
    computations = [Counted(number) for number in range(9)]
    for index, _ in enumerate(evaluated(tensors_of(computations), threads=4)):
        assert sum(one.calls for one in computations) <= index // 2 + 2
    assert Counted.most == 1


def test_a_failure_reaches_the_writer_and_nothing_more_is_begun():
    computations = [Counted(number) for number in range(40)]
    tensors = tensors_of(computations)

    def fail() -> list[ir.TensorProtocol]:
        raise MemoryError("too large")

    tensors[3:5] = joint_tensors(fail, SPECS)
    with pytest.raises(MemoryError, match="too large"):
        list(evaluated(tensors, threads=2))
    time.sleep(0.05)
    assert sum(one.calls for one in computations) < 10


def test_a_writer_that_stops_stops_the_threads():
    computations = [Counted(number) for number in range(40)]
    going = evaluated(tensors_of(computations), threads=2)
    next(going)
    going.close()
    before = sum(one.calls for one in computations)
    time.sleep(0.05)
    assert sum(one.calls for one in computations) == before < 10


def model_of(computations: list[Counted]) -> ir.Model:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    for number, tensor in enumerate(tensors_of(computations)):
        qgraph.ir.initializer(model.graph, f"w{number}", tensor)
    return model


@pytest.mark.parametrize("external_above", [0, 1 << 30])
def test_the_number_of_threads_does_not_change_the_file(external_above: int, tmp_path: Path, monkeypatch):
    written = []
    for cores in (1, 4):
        monkeypatch.setattr(lazy_tensors, "usable_cores", lambda cores=cores: cores)
        path = tmp_path / "model.onnx"
        computations = [Counted(number) for number in range(9)]
        qgraph.ir.save(model_of(computations), path, external_above=external_above)
        assert [one.calls for one in computations] == [1] * 9
        written.append([one.read_bytes() for one in sorted(tmp_path.iterdir())])
    assert written[0] == written[1]
    loaded = qgraph.ir.load(tmp_path / "model.onnx")
    assert [loaded.graph.initializers[f"w{1 + 2 * n}"].const_value.numpy()[0, 0] for n in range(9)] == list(range(9))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("too large")])
def test_nothing_is_left_of_a_file_that_was_not_finished(error: BaseException, tmp_path: Path):
    def fail() -> list[ir.TensorProtocol]:
        raise error

    model = model_of([Counted(number) for number in range(3)])
    for number, tensor in enumerate(joint_tensors(fail, SPECS)):
        qgraph.ir.initializer(model.graph, f"broken{number}", tensor)
    with pytest.raises(type(error)):
        qgraph.ir.save(model, tmp_path / "model.onnx", external_above=0)
    assert list(tmp_path.iterdir()) == []
