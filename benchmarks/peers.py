"""What a user of another tool would do to get an int8 model, one function per tool.

    python benchmarks/peers.py TOOL MODEL CALIBRATION_FOLDER OUTPUT

writes OUTPUT or fails as the tool fails; OUTPUT.json then tells the version, remarks and the failure's text. Runs as
a process of its own and imports nothing but the tool, so that its time and memory are the tool's.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["TOOLS", "feeds_of", "one_line"]

Remarks = list[str]


def feeds_of(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield the feeds that are stored in `folder`, in the order of their names."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            yield dict(arrays)


def ort_preprocess(model: Path, calibration: Path, output: Path) -> Remarks:
    """Prepare a model for `quantize_static` as its documentation asks, with what it takes to get through."""
    del calibration
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(str(model), str(output))
    except Exception as error:  # noqa: BLE001 - it raises a bare Exception
        remark = f"quant_pre_process fails ({one_line(error)}); done without symbolic shapes"
        quant_pre_process(str(model), str(output), skip_symbolic_shape=True)
        return [remark]
    return []


def raise_opset(model: Path, calibration: Path, output: Path) -> Remarks:
    """Raise an old model to opset 17, with initializers that are no inputs, as a user of `quantize_static` has to."""
    del calibration
    import onnx
    import onnx.version_converter

    old = onnx.load(model)
    constants = {tensor.name for tensor in old.graph.initializer}
    inputs = [value for value in old.graph.input if value.name not in constants]
    del old.graph.input[:]
    old.graph.input.extend(inputs)
    old.ir_version = max(old.ir_version, 8)
    onnx.save(onnx.version_converter.convert_version(old, 17), output)
    return []


def _ort_static(method: str, *, per_channel: bool = True) -> Callable[[Path, Path, Path], Remarks]:
    def quantize(model: Path, calibration: Path, output: Path) -> Remarks:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        class Reader(CalibrationDataReader):  # type: ignore[misc]  # the base class is untyped
            def __init__(self) -> None:
                self.feeds = feeds_of(calibration)

            def get_next(self) -> dict[str, np.ndarray] | None:
                return next(self.feeds, None)

        quantize_static(
            str(model),
            str(output),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
        )
        return []

    return quantize


def ort_dynamic(model: Path, calibration: Path, output: Path) -> Remarks:
    """`quantize_dynamic` per channel."""
    del calibration
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(model), str(output), per_channel=True)
    return []


def _onnxsim(quantize: Callable[[Any, Any, Path], Any], *, first: bool = False) -> Callable[..., Remarks]:
    """Quantize and then simplify, which drops the float weights that quantizing leaves behind.

    Simplifying `first` as well folds batch norms and brings to light the weights that the older exporter hides, but
    turns products into Gemm, which ONNX Runtime may run slower than in float. Users have to try both.
    """

    def run(model: Path, calibration: Path, output: Path) -> Remarks:
        import onnx
        import onnxsim  # type: ignore[import-not-found]  # not among our dependencies

        source = onnxsim.simplify(str(model))[0] if first else onnx.load(model)
        onnx.save(onnxsim.simplify(quantize(onnxsim, source, calibration))[0], output)
        return []

    return run


def _onnxsim_static(onnxsim: Any, model: Any, calibration: Path) -> Any:
    return onnxsim.quantize_static(model, calibration_data=list(feeds_of(calibration)))


def _onnxsim_dynamic(onnxsim: Any, model: Any, calibration: Path) -> Any:
    del calibration
    return onnxsim.quantize_dynamic_matmul_integer_to_float(model)


TOOLS: dict[str, Callable[[Path, Path, Path], Remarks]] = {
    "raise-opset": raise_opset,
    "ort-preprocess": ort_preprocess,
    "ort-static-minmax": _ort_static("MinMax"),
    "ort-static-entropy": _ort_static("Entropy"),
    "ort-static-percentile": _ort_static("Percentile"),
    "ort-static-minmax-per-tensor": _ort_static("MinMax", per_channel=False),
    "ort-static-entropy-per-tensor": _ort_static("Entropy", per_channel=False),
    "ort-static-percentile-per-tensor": _ort_static("Percentile", per_channel=False),
    "ort-dynamic": ort_dynamic,
    "onnxsim-static": _onnxsim(_onnxsim_static),
    "onnxsim-simplify-static": _onnxsim(_onnxsim_static, first=True),
    "onnxsim-dynamic": _onnxsim(_onnxsim_dynamic),
    "onnxsim-simplify-dynamic": _onnxsim(_onnxsim_dynamic, first=True),
}


def one_line(error: BaseException) -> str:
    """Return the kind and the text of `error`, cut to what a table can hold."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def main() -> int:
    tool, model, calibration, output = sys.argv[1], *map(Path, sys.argv[2:5])
    verdict: dict[str, Any] = {"tool": tool, "failure": None, "remarks": []}
    warnings.simplefilter("ignore")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            tempfile.tempdir = scratch
            verdict["remarks"] = TOOLS[tool](model, calibration, output)
    except Exception as error:  # noqa: BLE001 - whatever a tool raises is what its user gets
        verdict["failure"] = one_line(error)
    output.with_suffix(".json").write_text(json.dumps(verdict))
    return 0 if verdict["failure"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
