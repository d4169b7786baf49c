"""Measure what low-bit weights cost language models, against ONNX Runtime at the same bits and group.

    python benchmarks/language.py [--models stories260k,pydoc_decoder] [--bits 4,3,2] [--group 32]
                                  [--methods ort-rtn,gptq,...] [--windows N] [--artifacts] [-o language.json]

Each method changes the same weights: those of the MatMuls whose weight is an initializer, which are all that ONNX
Runtime's tools take; embeddings and what is tied to them stay as they are. Calibration and evaluation text are apart:
stories260k is calibrated on the first 64 stories of its development text and evaluated on the others, pydoc_decoder on
windows of its training text and on all of its held-out text. The loss is mean negative log-likelihood in nats a token.

Weights are evaluated as floats, in float arithmetic, so that what is measured is the weights. `--artifacts` compiles
qgraph's for cpu-int4 as well, and evaluates what is lowered there, with activations in 8 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from data import assets
from sentencepiece import write_tokenizer

import qgraph.compiler
import qgraph.ir
from qgraph.analysis.compressed_weights import compressed
from qgraph.analysis.linear_layers import linear_layers
from qgraph.evaluation import perplexity
from qgraph.models import corpus, pydoc_decoder
from qgraph.pipeline import Context, Feeds, Pipeline
from qgraph.tokens import open_tokenizer, read_documents

__all__ = ["MODELS", "Language"]

PEERS = ("ort-rtn", "ort-hqq", "ort-gptq")
OURS = {
    "rtn": "rtn{scheme}",
    "hqq": "hqq{scheme}",
    "gptq": "gptq{scheme}",
    "awq+gptq": "awq{plain},gptq{scheme}",
    "rotate+gptq": "rotate,gptq{scheme}",
    "mixed+gptq": "mixed-bits{mixed},gptq{scheme}",
}
MIXED = "mixed+gptq"
"""Widths of 2, 4 and 8 bits in no more bytes than the uniform scheme takes; asked for where that has 4 bits."""
CALIBRATION = 64
WINDOW = 256


@dataclasses.dataclass(frozen=True)
class Language:
    """A language model, feeds to calibrate on, and documents (token numbers) to evaluate on, in windows of `window`."""

    model: ir.Model
    calibration: list[Feeds]
    documents: list[np.ndarray]
    window: int


def stories260k(windows: int | None) -> Language:
    """Llama-2 architecture, trained on TinyStories."""
    folder = assets()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.json"
        write_tokenizer(folder / "stories260k" / "tok512.json", path)
        texts = read_documents(folder / "text_lm" / "tinystories_dev.jsonl")
        documents = [one.ids for one in open_tokenizer(path).encode(texts)]
    calibration = [{"input_ids": np.asarray(one[:WINDOW], np.int64)[None]} for one in documents[:CALIBRATION]]
    model = qgraph.ir.load(folder / "stories260k" / "stories260K.onnx")
    return Language(model, calibration, documents[CALIBRATION:][:windows], 512)


def pydoc(windows: int | None) -> Language:
    """The decoder that ships with qgraph."""
    calibration = corpus.windows(corpus.training_text(), WINDOW, CALIBRATION)
    inputs, labels = corpus.next_byte_windows(corpus.held_out_text(), WINDOW)
    documents = [np.append(one, label[-1]) for one, label in zip(inputs, labels, strict=True)]
    feeds = [{"input_ids": one[None]} for one in calibration]
    return Language(pydoc_decoder.build(), feeds, documents[:windows], WINDOW + 1)


MODELS: dict[str, Callable[[int | None], Language]] = {"stories260k": stories260k, "pydoc_decoder": pydoc}


# --- evaluation -------------------------------------------------------------------------------------------------------


def nats(language: Language, model: str | Path | ir.Model) -> float:
    """Return the mean loss of a token; DequantizeLinear is left to no fusion that would round activations."""
    if isinstance(model, ir.Model):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            qgraph.ir.save(model, path)
            return nats(language, path)
    return perplexity(model, language.documents, window=language.window, stride=language.window).nats


def as_floats(model: ir.Model) -> ir.Model:
    """Put floats in the place of compressed weights."""
    for weight in list(compressed(model)):
        assert weight.dequantize is not None
        values = weight.quantized().dequantize()
        floats = np.ascontiguousarray(values if weight.transposed else values.T)
        constant = qgraph.ir.initializer(model.graph, f"{weight.name}_floats", floats)
        weight.dequantize.outputs[0].replace_all_uses_with(constant)
        model.graph.remove(weight.dequantize, safe=True)
    return model


def unpacked(path: Path) -> onnx.ModelProto:
    """Put MatMul with floats in the place of MatMulNBits, whose kernels for 2 bits are slow in float arithmetic."""
    model = onnx.load(path)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        size = {one.name: one.i for one in node.attribute}
        groups = -(-size["K"] // size["block_size"])
        scale = constants[node.input[2]].reshape(size["N"], groups, 1)
        zero: Any = 1 << (size["bits"] - 1)
        if len(node.input) > 3 and node.input[3]:
            zero = constants[node.input[3]]
            zero = _codes(zero, size["bits"]) if zero.dtype == np.uint8 else zero
            zero = zero.reshape(size["N"], -1)[:, :groups, None]
        codes = _codes(constants[node.input[1]].reshape(size["N"], groups, -1), size["bits"])
        weight = ((codes.astype(np.float32) - zero) * scale).reshape(size["N"], -1)[:, : size["K"]]
        name = f"{node.input[1]}_floats"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T, np.float32), name))
        inputs = [node.input[0], name]
        node.CopyFrom(onnx.helper.make_node("MatMul", inputs, list(node.output), name=node.name))
    return model


def _codes(packed: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)


# --- methods ----------------------------------------------------------------------------------------------------------


def peer(method: str, language: Language, bits: int, group: int) -> tuple[float | None, str]:
    """Return the loss of what a peer writes, and remarks or the failure."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        qgraph.ir.save(language.model, folder / "model.onnx")
        output, remark = peer_model(method, folder / "model.onnx", language.calibration, folder, bits, group)
        if output is None:
            return None, remark
        onnx.save(unpacked(output), folder / "floats.onnx")
        return nats(language, folder / "floats.onnx"), remark


def peer_model(
    method: str, model: Path, feeds: Sequence[Feeds], folder: Path, bits: int, group: int
) -> tuple[Path | None, str]:
    """Let a peer write a model into `folder`; return where it is, or None, and remarks or the failure."""
    for number, feed in enumerate(feeds):
        np.savez(folder / f"{number:05}.npz", **feed)
    output = folder / "output.onnx"
    command = [sys.executable, str(Path(__file__).with_name("language_peers.py")), method]
    command += [str(model), str(folder), str(output), str(bits), str(group)]
    subprocess.run(command, check=False, capture_output=True, env=os.environ.copy())
    verdict = json.loads(output.with_suffix(".json").read_text())
    if verdict["failure"]:
        return None, verdict["failure"]
    return output, ", ".join(verdict["remarks"])


def ours(text: str, language: Language, *, artifact: bool) -> tuple[float, float | None]:
    """Return the loss of the weights, and of the artifact if that is wanted."""
    model = language.model.clone()
    context = Context(calibration=language.calibration)
    Pipeline.parse(f"convert-opset{{version=21}},{text}").run(model, context=context)
    loss = nats(language, as_floats(model))
    if not artifact:
        return loss, None
    with tempfile.TemporaryDirectory() as folder:
        made = qgraph.compiler.compile(
            language.model, "cpu-int4", output=Path(folder) / "artifact", calibration=language.calibration, passes=text
        )
        return loss, nats(language, made.path)


def pipeline_text(method: str, language: Language, bits: int, group: int) -> str:
    """Return the passes of a method for the layers that the peers take too."""
    found = linear_layers(language.model)
    tables = {layer.weight for layer in found.layers if layer.kind == "embedding"}
    tied = [layer.name for layer in found.layers if layer.weight in tables and layer.kind == "linear"]
    exclude = f",exclude=[{','.join(map(json.dumps, tied))}]" if tied else ""
    plain = f"{{bits={bits},group={group}{exclude}}}"
    readers = [layer.name for layer in found.layers if layer.weight in tables]
    mixed = f'{{like="{bits}g{group}",exclude=[{",".join(map(json.dumps, readers))}]}}'
    scheme = plain[:-1] + ",embeddings=false,min_elements=0}"
    return OURS[method].replace("{scheme}", scheme).replace("{plain}", plain).replace("{mixed}", mixed)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the losses of one model."""
    language = MODELS[name](arguments.windows)
    base = nats(language, language.model)
    result: dict[str, Any] = {"fp32": base, "tokens": sum(map(len, language.documents)), "bits": {}}
    print(f"{name}: {base:.4f} nats per token in float32", flush=True)
    for bits in map(int, arguments.bits.split(",")):
        rows: dict[str, Any] = {}
        result["bits"][bits] = rows
        for method in arguments.methods.split(","):
            if method == MIXED and bits != 4:
                continue
            start = time.perf_counter()
            row: dict[str, Any] = {}
            if method in PEERS:
                loss, row["remarks"] = peer(method, language, bits, arguments.group)
            else:
                row["passes"] = pipeline_text(method, language, bits, arguments.group)
                loss, lowered = ours(row["passes"], language, artifact=arguments.artifacts)
                if lowered is not None:
                    row["artifact"] = lowered - base
            row["lost"] = None if loss is None else loss - base
            row["seconds"] = round(time.perf_counter() - start, 1)
            rows[method] = row
            print(_line(bits, method, row, rows.get("ort-rtn", {}).get("lost")), flush=True)
    return result


def _line(bits: int, method: str, row: dict[str, Any], reference: float | None) -> str:
    if row["lost"] is None:
        return f"  {bits} bits  {method:<12}  does not run: {row['remarks']}"
    text = f"  {bits} bits  {method:<12} {row['lost']:+9.4f} nats"
    if reference:
        text += f"   {1 - row['lost'] / reference:7.1%} of what ORT's rounding loses is recovered"
    if "artifact" in row:
        text += f"   cpu-int4 {row['artifact']:+9.4f}"
    return text + (f"   ({row['remarks']})" if row.get("remarks") else "")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--methods", default=",".join((*PEERS, *OURS)))
    parser.add_argument("--windows", type=int, help="evaluate on that many documents only")
    parser.add_argument("--artifacts", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    results = {"group": options.group, "models": {}}
    for name in options.models.split(","):
        results["models"][name] = measure(name, options)
        if options.output is not None:
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
