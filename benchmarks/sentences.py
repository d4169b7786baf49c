"""Measure what 4-bit weights cost a sentence encoder, against ONNX Runtime at the same bits and group.

    python benchmarks/sentences.py [--model minilm_dynamo_sdpa] [--bits 4] [--group 32] [--methods ort-rtn,gptq,...]
                                   [--pairs 1500] [-o sentences.json]

The score is Spearman's correlation x100 on the development split of STS-B; calibration takes sentences of its training
split. Two or three tenths of a point are chance: the distance of the embeddings from those of the float model (1 -
cosine) tells methods apart more finely. Embedding tables stay as they are, as ONNX Runtime's tools leave them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data
import language
import numpy as np
import onnx

import qgraph.ir
from qgraph.pipeline import Context, Pipeline
from qgraph.runtime.session import input_signature, open_session

__all__: list[str] = []

METHODS = tuple(method for method in language.OURS if method != language.MIXED)


def embeddings(task: data.Task, model: Path) -> np.ndarray:
    """Return the embeddings of all sentences of the evaluation."""
    session = open_session(model)
    names = [one.name for one in input_signature(session)]
    runs = ((feed, session.run(None, {name: feed[name] for name in names})) for feed in task.evaluation())
    return np.concatenate([task.features(outputs, feed) for feed, outputs in runs])


def written(method: str, task: data.Task, folder: Path, bits: int, group: int) -> tuple[Path | None, str]:
    """Write the model of a method with its weights as floats; return where, and remarks."""
    path = folder / "floats.onnx"
    feeds = list(task.calibration())
    if method in language.PEERS:
        output, remark = language.peer_model(method, task.model(), feeds, folder, bits, group)
        if output is not None:
            onnx.save(language.unpacked(output), path)
        return None if output is None else path, remark
    plain = f"{{bits={bits},group={group}}}"
    passes = language.OURS[method].replace("{plain}", plain).replace("{scheme}", plain[:-1] + ",embeddings=false}")
    model = qgraph.ir.load(task.model())
    pipeline = Pipeline.parse(f"convert-opset{{version=21}},{passes}")
    pipeline.run(model, context=Context(calibration=feeds))
    qgraph.ir.save(language.as_floats(model), path)
    return path, ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="minilm_dynamo_sdpa")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--methods", default=",".join((*language.PEERS, *METHODS)))
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    task = data.TASKS[options.model]
    assert isinstance(task, data.Sentences)
    task = dataclasses.replace(task, pairs=options.pairs)
    reference = embeddings(task, task.model())
    base = task.score(reference)
    results: dict[str, Any] = {"model": options.model, "bits": options.bits, "group": options.group, "fp32": base}
    print(f"{options.model}: {base:.3f} in float32", flush=True)
    for method in options.methods.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path, remark = written(method, task, Path(folder), options.bits, options.group)
            if path is None:
                results[method] = {"failure": remark}
                print(f"  {method:<12} does not run: {remark}", flush=True)
                continue
            found = embeddings(task, path)
        distance = 1 - float((found * reference).sum(axis=1).mean())
        results[method] = {"lost": base - task.score(found), "distance": distance, "remark": remark}
        print(
            f"  {method:<12} loses {base - task.score(found):+.3f}   1 - cosine {distance:.5f}   {remark}", flush=True
        )
        if options.output is not None:
            options.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
