"""What a user of NNCF, AIMET or onnxsim would do for the accuracy of an 8-bit or 4-bit model, one function per tool.

    python benchmarks/accuracy_peers.py TOOL MODEL CALIBRATION_FOLDER OUTPUT

writes OUTPUT or fails as the tool fails; OUTPUT.json then tells remarks, the failure's text, and what the rounding of
weights took where the tool has such a step. Runs in the tool's own environment (`PACKAGES`) as a process of its own;
the tools of ONNX Runtime are those of peers.py.

AIMET exports its simulation as QuantizeLinear and DequantizeLinear; its 4-bit models keep biases in float.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peers

__all__ = ["PACKAGES", "REVISION", "TOOLS", "TOO_SLOW", "package_of"]

PACKAGES = {
    "onnxsim": ("onnxsim==0.8.1",),
    "nncf": ("nncf==3.4.0",),
    "aimet": ("aimet-onnx==2.42.0", "torch==2.13.0"),
}
"""What is installed for the tools whose names begin so; the others run with our own ONNX Runtime."""
REVISION = 1
"""Raise it when a function here asks something else of its tool, so that nothing kept from before is used."""
TOO_SLOW = {("onnxsim-int4-adaround", "mobilenet_v2"): "not tried: about ten minutes at its speed on resnet20"}
"""(tool, task) -> why it is left out."""

_ITERATIONS = 500
"""Of AIMET's AdaRound, for each layer; its default is 10000, which takes hours on a processor."""

Figures = dict[str, Any]


def package_of(tool: str) -> str | None:
    """Return the key in `PACKAGES` of what `tool` needs, or None for ONNX Runtime's."""
    return next((name for name in PACKAGES if tool.startswith(name)), None)


def _nncf(*, fast: bool, per_channel: bool = True) -> Callable[[Path, Path, Path], Figures]:
    """`nncf.quantize` by its defaults, on all calibration data."""

    def run(model: Path, calibration: Path, output: Path) -> Figures:
        import nncf  # type: ignore[import-not-found]  # not among our dependencies
        from nncf.quantization.advanced_parameters import (  # type: ignore[import-not-found]
            AdvancedQuantizationParameters,
            QuantizationParameters,
        )

        feeds = list(peers.feeds_of(calibration))
        weights = None if per_channel else QuantizationParameters(per_channel=False)
        quantized = nncf.quantize(
            onnx.load(model),
            nncf.Dataset(feeds),
            subset_size=len(feeds),
            fast_bias_correction=fast,
            advanced_parameters=AdvancedQuantizationParameters(
                weights_quantization_params=weights, activations_quantization_params=weights
            ),
        )
        onnx.save(quantized, output)
        return {}

    return run


def _aimet(
    *, equalize: bool = True, per_channel: bool = True, bits: int = 8, adaround: bool = False, scheme: str = "min_max"
) -> Callable[[Path, Path, Path], Figures]:
    """`QuantizationSimModel`, with cross-layer equalization and AdaRound where asked, exported with Q and DQ."""

    def run(model: Path, calibration: Path, output: Path) -> Figures:
        import aimet_onnx  # type: ignore[import-not-found]  # not among our dependencies
        from aimet_onnx.common.quantsim_config import utils  # type: ignore[import-not-found]
        from aimet_onnx.cross_layer_equalization import equalize_model  # type: ignore[import-not-found]

        loaded, feeds = onnx.load(model), list(peers.feeds_of(calibration))
        if equalize:
            equalize_model(loaded)
        sim = aimet_onnx.QuantizationSimModel(
            loaded,
            param_type=aimet_onnx.int4 if bits == 4 else aimet_onnx.int8,
            activation_type=aimet_onnx.int8,
            quant_scheme=scheme,
            config_file=utils.get_path_for_per_channel_config()
            if per_channel
            else utils.get_path_for_per_tensor_config(),
        )
        figures: Figures = {}
        if adaround:
            start = time.perf_counter()
            aimet_onnx.apply_adaround(sim, feeds, num_iterations=_ITERATIONS)
            figures["rounding"] = {"parameters": _weights(loaded), "seconds": time.perf_counter() - start}
            figures["remarks"] = [f"{_ITERATIONS} iterations a layer"]
        sim.compute_encodings(feeds)
        onnx.save(sim.to_onnx_qdq(export_int32_bias=bits == 8, prequantize_constants=True), output)
        return figures

    return run


def _weights(model: onnx.ModelProto) -> int:
    """Return how many weights the convolutions and products have."""
    read = {node.input[1] for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    return int(sum(np.prod(tensor.dims) for tensor in model.graph.initializer if tensor.name in read))


def _onnxsim(*, per_channel: bool = True, equalize: bool = False, correct: bool = False) -> Callable[..., Figures]:
    """`quantize_full_qdq`, after equalization and with biases corrected where asked."""

    def run(model: Path, calibration: Path, output: Path) -> Figures:
        import onnxsim  # type: ignore[import-not-found]  # not among our dependencies
        from onnxsim.full_qdq import quantize_full_qdq  # type: ignore[import-not-found]

        source, feeds = onnxsim.simplify(str(model))[0], list(peers.feeds_of(calibration))
        if equalize:
            source = onnxsim.cross_layer_equalize(source)
        quantized = quantize_full_qdq(source, feeds, per_channel=per_channel)
        if correct:
            quantized = onnxsim.correct_bias(source, quantized, feeds)
        onnx.save(quantized, output)
        return {}

    return run


def _onnxsim_gptq(model: Path, calibration: Path, output: Path) -> Figures:
    """GPTQ to 4 bits on the grid of a channel, after equalization: what there is for 4-bit convolutions."""
    import onnxsim
    from onnxsim.full_qdq import quantize_full_qdq
    from onnxsim.quark_weight_rounding import gptq_int8  # type: ignore[import-not-found]

    feeds = list(peers.feeds_of(calibration))
    source = onnxsim.cross_layer_equalize(onnxsim.simplify(str(model))[0])
    quantized = quantize_full_qdq(source, feeds)
    start = time.perf_counter()
    rounded, layers = gptq_int8(source, quantized, feeds, bits=4, per_channel=True)
    rounding = {"parameters": sum(int(np.prod(one.shape)) for one in layers), "seconds": time.perf_counter() - start}
    onnx.save(rounded, output)
    return {"rounding": rounding, "remarks": ["depthwise convolutions stay in 8 bits"]}


def _onnxsim_adaround(model: Path, calibration: Path, output: Path) -> Figures:
    """Its 4-bit weights (groups of 32, float activations) with AdaRound, which leaves convolutions alone.

    The speed is therefore that of its AdaRound for 8-bit weights, which knows convolutions, by its defaults.
    """
    import onnxsim
    from onnxsim.full_qdq import quantize_full_qdq
    from onnxsim.quark_weight_rounding import adaround_int8

    feeds = list(peers.feeds_of(calibration))
    source = onnxsim.cross_layer_equalize(onnxsim.simplify(str(model))[0])
    rounded = onnxsim.apply_adaround(source, onnxsim.quantize_weight_only_int4(source), feeds)
    onnx.save(onnxsim.simplify(rounded)[0], output)
    quantized = quantize_full_qdq(source, feeds)
    start = time.perf_counter()
    _, layers = adaround_int8(source, quantized, feeds)
    rounding = {"parameters": sum(int(np.prod(one.shape)) for one in layers), "seconds": time.perf_counter() - start}
    return {
        "rounding": rounding,
        "aside": "its activations are float",
        "remarks": ["weights only, groups of 32; its AdaRound does not know 4-bit convolutions, timed at 8 bits"],
    }


TOOLS: dict[str, Callable[[Path, Path, Path], Figures]] = {
    "nncf": _nncf(fast=True),
    "nncf-full": _nncf(fast=False),
    "nncf-per-tensor": _nncf(fast=True, per_channel=False),
    "nncf-full-per-tensor": _nncf(fast=False, per_channel=False),
    "aimet": _aimet(equalize=False),
    "aimet-cle": _aimet(),
    "aimet-cle-enhanced": _aimet(scheme="tf_enhanced"),
    "aimet-per-tensor": _aimet(equalize=False, per_channel=False),
    "aimet-cle-per-tensor": _aimet(per_channel=False),
    "aimet-cle-enhanced-per-tensor": _aimet(per_channel=False, scheme="tf_enhanced"),
    "aimet-int4": _aimet(bits=4, scheme="tf_enhanced"),
    "aimet-int4-adaround": _aimet(bits=4, scheme="tf_enhanced", adaround=True),
    "onnxsim-full-qdq": _onnxsim(),
    "onnxsim-full-qdq-per-tensor": _onnxsim(per_channel=False),
    "onnxsim-cle-per-tensor": _onnxsim(per_channel=False, equalize=True),
    "onnxsim-cle-bias-per-tensor": _onnxsim(per_channel=False, equalize=True, correct=True),
    "onnxsim-int4-gptq": _onnxsim_gptq,
    "onnxsim-int4-adaround": _onnxsim_adaround,
}


def main() -> int:
    tool, model, calibration, output = sys.argv[1], *map(Path, sys.argv[2:5])
    verdict: dict[str, Any] = {"failure": None, "remarks": []}
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            tempfile.tempdir = scratch
            start = time.perf_counter()
            if tool in TOOLS:
                verdict |= TOOLS[tool](model, calibration, output)
            else:
                verdict["remarks"] = peers.TOOLS[tool](model, calibration, output)
            verdict["seconds"] = time.perf_counter() - start
    except Exception as error:  # noqa: BLE001 - whatever a tool raises is what its user gets
        verdict["failure"] = peers.one_line(error)
    output.with_suffix(".json").write_text(json.dumps(verdict))
    return 0 if verdict["failure"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
