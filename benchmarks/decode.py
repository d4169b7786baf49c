"""Measure how fast a decoder with a cache writes text, in float and with 4-bit weights, ours and ONNX Runtime's.

    python benchmarks/decode.py [--shape 2k] [--layers 4] [--tokens 48] [--prompt 32] [--device cpu] [-o decode.json]

The model is a Llama with random weights, exported by `qgraph export` from a folder that is made in a temporary place.
On the CPU, qgraph compiles it for cpu-fp32 and cpu-int4 by its defaults, and ONNX Runtime's MatMulNBitsQuantizer rounds
it to the same groups at accuracy level 4; all against the float graph as exported. On a GPU (`--device cuda`), it is
exported in float16, and compiled for cuda-fp16 and cuda-int4: `--shape 7b --layers 32` is all of a Llama 2 7B, which
takes 13 GB for each file. All sessions run in turn, token after token, in one process with spinning off, each with its
own growing cache, which stays on the device; the median over the tokens counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timing

__all__ = ["SHAPES", "Decoder", "Shape", "decode_in_turn", "write_checkpoint"]

GROUP = 32


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000


SHAPES = {
    "2k": Shape(2048, 5632, 16, 16),
    "2k-grouped": Shape(2048, 5632, 16, 4),
    "7b": Shape(4096, 11008, 32, 32),
    "7b-grouped": Shape(4096, 14336, 32, 8),
}
"""7b is Llama 2, 7b-grouped Mistral."""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
QUANTIZE = """
import sys, onnx
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
config = DefaultWeightOnlyQuantConfig(block_size=int(sys.argv[3]), is_symmetric=False, accuracy_level=4)
quantizer = MatMulNBitsQuantizer(onnx.load(sys.argv[1]), algo_config=config)
quantizer.process()
quantizer.model.save_model_to_file(sys.argv[2], use_external_data_format=True)
"""


def write_checkpoint(folder: Path, shape: Shape, layers: int) -> None:
    """Write config.json and model.safetensors of a Llama with random weights in bfloat16."""
    import ml_dtypes

    folder.mkdir(parents=True)
    hidden, inner, vocabulary = shape.hidden, shape.inner, shape.vocabulary
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    width = hidden // shape.heads * shape.kv_heads
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, hidden) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    header, end = {}, 0
    for name, dims in shapes.items():
        begin, end = end, end + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dims in shapes.values():
            weight = random.standard_normal(dims, dtype=np.float32) * np.float32(dims[-1] ** -0.5)
            file.write((weight if len(dims) > 1 else np.ones(dims)).astype(ml_dtypes.bfloat16).tobytes())


class Decoder:
    """A session that continues a text, with its cache on the device."""

    def __init__(self, model: Path, prompt: np.ndarray, device: str = "cpu") -> None:
        self._session = timing.session(model, provider=PROVIDERS[device])
        self._device = device
        self._outputs = [one.name for one in self._session.get_outputs()]
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._cache: dict[str, Any] = {
            one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), kinds[one.type])
            for one in self._session.get_inputs()
            if one.name.startswith("past_key_values.")
        }
        self._seen = 0
        self.logits = self.read(prompt)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Read tokens int64 [1, length], and return the logits of the last."""
        self._seen += ids.shape[1]
        binding = self._session.io_binding()
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, self._seen), np.int64), **self._cache}
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == "logits" else self._device)
        self._session.run_with_iobinding(binding)
        given = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        self._cache = {name: given[name.replace("past_key_values.", "present.")] for name in self._cache}
        return np.asarray(given["logits"].numpy())[0, -1]


def decode_in_turn(
    models: Mapping[str, Path], vocabulary: int, prompt: int, tokens: int, device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Let the models continue the same text token by token, and return what each took and how it compares."""
    ids = np.random.default_rng(1).integers(0, vocabulary, (1, prompt + tokens))
    decoders = {name: Decoder(path, ids[:, :prompt], device) for name, path in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(tokens):
        order = list(decoders.items())
        shift = number % len(order)
        for name, one in order[shift:] + order[:shift]:
            start = time.perf_counter()
            one.logits = one.read(ids[:, prompt + number : prompt + number + 1])
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(models))
    exact = decoders[first].logits.astype(np.float64)
    figures = {}
    for name, one in decoders.items():
        error = np.square(one.logits - exact).sum()
        median = float(np.median(seconds[name]))
        figures[name] = {
            "tokens_per_second": round(1 / median, 2),
            "milliseconds": round(1e3 * median, 2),
            "times_float": round(float(np.median(np.divide(seconds[first], seconds[name]))), 2),
            "logits_sqnr_db": round(float(10 * np.log10(np.square(exact).sum() / error)), 1) if error else None,
            "bytes": sum(path.stat().st_size for path in models[name].parent.glob(f"{models[name].name}*")),
        }
    return figures


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Export, compress and decode; everything is written under `work`."""
    shape, device = SHAPES[options.shape], options.device
    write_checkpoint(work / "checkpoint", shape, options.layers)
    source = work / "float/model.onnx"
    source.parent.mkdir()
    precision = "float32" if device == "cpu" else "float16"
    _do("qgraph", "export", work / "checkpoint", "-o", source, "--dtype", precision)
    models = {precision: source} if device == "cpu" else {}
    for target in ("cpu-fp32", "cpu-int4") if device == "cpu" else ("cuda-fp16", "cuda-int4"):
        passes = ["--passes", options.passes] if options.passes and target.endswith("int4") else []
        _do("qgraph", "compile", source, "--target", target, "-o", work / target, *passes)
        models[f"qgraph {target}"] = work / target / "model.onnx"
    if device == "cpu":
        (work / "ort").mkdir()
        models["ort level 4"] = work / "ort/model.onnx"
        _do("-c", QUANTIZE, source, models["ort level 4"], GROUP)
    settings = {name: getattr(options, name) for name in ("shape", "layers", "prompt", "tokens", "passes", "device")}
    return {
        "machine": timing.machine(),
        "settings": {**settings, "hidden": shape.hidden},
        "decode": decode_in_turn(models, shape.vocabulary, options.prompt, options.tokens, device),
    }


def _do(*arguments: object) -> None:
    """Run Python on a module of the command line, or on a text."""
    command = [sys.executable, *(["-m"] if arguments[0] == "qgraph" else []), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:4])} failed: {done.stderr.strip().splitlines()[-1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="2k", help="sizes of a layer")
    parser.add_argument("--device", choices=PROVIDERS, default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--passes", help="replaces the compression to 4 bits")
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    if PROVIDERS[options.device] not in onnxruntime.get_available_providers():
        parser.error(f"ONNX Runtime has no {PROVIDERS[options.device]} here: pip install 'qgraph-compiler[cuda]'")
    with tempfile.TemporaryDirectory(prefix="qgraph-decode-") as work:
        result = measure(Path(work), options)
    for name, figures in result["decode"].items():
        print(f"{name:16}", "  ".join(f"{key} {value}" for key, value in figures.items()))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
