"""Measure how fast a decoder with a cache writes text, in float and with 4-bit weights, ours and ONNX Runtime's.

    python benchmarks/decode.py [--layers 4] [--tokens 48] [--prompt 32] [-o decode.json]

The model is a Llama of hidden 2048 with random weights, exported by `qgraph export` from a folder that is made in a
temporary place. qgraph compiles it for cpu-int4 by its defaults; ONNX Runtime's MatMulNBitsQuantizer rounds it to the
same groups at accuracy level 4. All sessions run in turn, token after token, in one process with spinning off, each
with its own growing cache; the median over the tokens counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timing

__all__ = ["Decoder", "decode_in_turn", "write_checkpoint"]

GROUP = 32
HIDDEN, INNER, HEADS, VOCABULARY = 2048, 5632, 16, 32000
QUANTIZE = """
import sys, onnx
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
config = DefaultWeightOnlyQuantConfig(block_size=int(sys.argv[3]), is_symmetric=False, accuracy_level=4)
quantizer = MatMulNBitsQuantizer(onnx.load(sys.argv[1]), algo_config=config)
quantizer.process()
quantizer.model.save_model_to_file(sys.argv[2], use_external_data_format=True)
"""


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write config.json and model.safetensors of a Llama with random weights in bfloat16."""
    import ml_dtypes

    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{layer}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            weight = random.standard_normal(shape, dtype=np.float32) * np.float32(shape[-1] ** -0.5)
            file.write((weight if len(shape) > 1 else np.ones(shape)).astype(ml_dtypes.bfloat16).tobytes())


class Decoder:
    """A session that continues a text, with its cache."""

    def __init__(self, model: Path, prompt: np.ndarray) -> None:
        self._session = timing.session(model)
        self._names = [one.name for one in self._session.get_outputs()]
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self._cache = {
            one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), kinds[one.type])
            for one in self._session.get_inputs()
            if one.name.startswith("past_key_values.")
        }
        self._seen = 0
        self.logits = self.read(prompt)

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Read tokens int64 [1, length], and return the logits of the last."""
        self._seen += ids.shape[1]
        mask = np.ones((1, self._seen), np.int64)
        logits, *present = self._session.run(self._names, {"input_ids": ids, "attention_mask": mask, **self._cache})
        self._cache = dict(zip(self._cache, present, strict=True))
        return np.asarray(logits)[0, -1]


def decode_in_turn(models: dict[str, Path], prompt: int, tokens: int) -> dict[str, dict[str, float]]:
    """Let the models continue the same text token by token, and return what each took and how it compares."""
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (1, prompt + tokens))
    decoders = {name: Decoder(path, ids[:, :prompt]) for name, path in models.items()}
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


def measure(work: Path, layers: int, prompt: int, tokens: int, passes: str | None) -> dict[str, Any]:
    """Export, compress and decode; everything is written under `work`."""
    write_checkpoint(work / "checkpoint", layers)
    source = work / "float/model.onnx"
    source.parent.mkdir()
    (work / "ort").mkdir()
    qgraph = [sys.executable, "-m", "qgraph"]
    options = ["--passes", passes] if passes else []
    for command in (
        [*qgraph, "export", str(work / "checkpoint"), "-o", str(source)],
        [*qgraph, "compile", str(source), "--target", "cpu-int4", "-o", str(work / "ours"), *options],
        [sys.executable, "-c", QUANTIZE, str(source), str(work / "ort/model.onnx"), str(GROUP)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command[:4])} failed: {done.stderr.strip().splitlines()[-1]}")
    models = {"float32": source, "qgraph cpu-int4": work / "ours/model.onnx", "ort level 4": work / "ort/model.onnx"}
    settings = {"layers": layers, "hidden": HIDDEN, "prompt": prompt, "tokens": tokens, "passes": passes}
    return {"machine": timing.machine(), "settings": settings, "decode": decode_in_turn(models, prompt, tokens)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--passes", help="replaces the compression of cpu-int4")
    parser.add_argument("-o", "--output", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qgraph-decode-") as work:
        result = measure(Path(work), options.layers, options.prompt, options.tokens, options.passes)
    for name, figures in result["decode"].items():
        print(f"{name:16}", "  ".join(f"{key} {value}" for key, value in figures.items()))
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
