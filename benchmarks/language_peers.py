"""What a user of ONNX Runtime would do to get low-bit weights, one function per method.

    python benchmarks/language_peers.py METHOD MODEL CALIBRATION_FOLDER OUTPUT BITS GROUP

writes OUTPUT or fails as the tool fails; OUTPUT.json then tells remarks and the failure's text. Runs as a process of
its own and imports nothing but the tool. HQQ needs torch: QGRAPH_PEER_PATH may name a folder of packages that has it.
Widths that the public entry refuses are taken through the function behind it, which gives the same values as floats.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

__all__ = ["METHODS"]

_PACKED = (2, 4, 8)


def _feeds(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            yield dict(arrays)


def _weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    read = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    return [tensor for tensor in model.graph.initializer if tensor.name in read]


def _replace(tensor: onnx.TensorProto, transposed: np.ndarray) -> None:
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(transposed.T, np.float32), tensor.name))


def ort_rtn(model: Path, calibration: Path, output: Path, bits: int, group: int) -> list[str]:
    """Round to nearest as `MatMulNBitsQuantizer` does by default."""
    del calibration
    loaded = onnx.load(model)
    if bits not in _PACKED:
        # `rtn_quantize` itself writes broken tensors where the group does not divide the inputs.
        from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor

        for tensor in _weights(loaded):
            weight = onnx.numpy_helper.to_array(tensor).T
            padded = np.pad(weight, ((0, 0), (0, -weight.shape[1] % group)))
            codes, scale, zero = quant_tensor(padded, bits, group, "asym", "uint")
            values = ((codes - zero) * scale).reshape(padded.shape)[:, : weight.shape[1]]
            _replace(tensor, values)
        onnx.save(loaded, output)
        return [f"{bits} bits through quant_tensor, as floats"]
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(loaded, bits=bits, block_size=group, is_symmetric=False)
    quantizer.process()
    quantizer.model.save_model_to_file(str(output))
    return []


def ort_hqq(model: Path, calibration: Path, output: Path, bits: int, group: int) -> list[str]:
    """Half-quadratic quantization."""
    del calibration
    from onnxruntime.quantization import matmul_nbits_quantizer as ort

    config = ort.HQQWeightOnlyQuantConfig(block_size=group, bits=bits)
    loaded = onnx.load(model)
    if bits in _PACKED:
        quantizer = ort.MatMulNBitsQuantizer(loaded, bits=bits, block_size=group, algo_config=config)
        quantizer.process()
        quantizer.model.save_model_to_file(str(output))
        return []
    import torch

    rounding = ort.HQQWeightOnlyQuantizer(config)
    for tensor in _weights(loaded):
        weight = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor).T)
        codes, scale, zero = rounding.quantize_internal(torch.from_numpy(weight), bits=bits, group_size=group)
        spread = [np.repeat(one.numpy(), group, axis=1) for one in (scale, zero)]
        _replace(tensor, ((codes.numpy() - spread[1]) * spread[0])[:, : weight.shape[1]])
    onnx.save(loaded, output)
    return [f"{bits} bits through quantize_internal, as floats"]


def ort_gptq(model: Path, calibration: Path, output: Path, bits: int, group: int) -> list[str]:
    """GPTQ as bundled, by its defaults. Release 1.31.1 feeds no error back: it reads the empty half of a triangle."""
    from onnxruntime.quantization.neural_compressor import gptq_quantize

    class Loader:
        batch_size = 1

        def __iter__(self) -> Iterator[tuple[Any, None]]:
            for feed in _feeds(calibration):
                yield feed, None

    loaded = onnx.load(model)
    result = gptq_quantize(loaded, Loader(), num_bits=bits, group_size=group, scheme="asym", n_samples=-1)
    onnx.save(getattr(result, "model", result), output)
    return [] if bits == 4 else [f"{bits} bits as floats"]


METHODS = {"ort-rtn": ort_rtn, "ort-hqq": ort_hqq, "ort-gptq": ort_gptq}


def main() -> int:
    method, model, calibration, output = sys.argv[1], *map(Path, sys.argv[2:5])
    bits, group = map(int, sys.argv[5:7])
    verdict: dict[str, Any] = {"failure": None, "remarks": []}
    warnings.simplefilter("ignore")
    sys.path += filter(None, [os.environ.get("QGRAPH_PEER_PATH")])
    try:
        verdict["remarks"] = METHODS[method](model, calibration, output, bits, group)
    except Exception as error:  # noqa: BLE001 - whatever a tool raises is what its user gets
        verdict["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    output.with_suffix(".json").write_text(json.dumps(verdict))
    return 0 if verdict["failure"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
