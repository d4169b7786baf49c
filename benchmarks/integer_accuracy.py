"""What integer arithmetic costs in accuracy: the integer graph beside QDQ graphs and the float model.

All forms come from the same calibration data. `cpu-int8` is what that target makes by itself, which leaves in float
what its runtime has no kernels for; the others start from the model as the target `integer` prepares it.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import data
import integer_subjects
import metrics
import numpy as np
import onnx_ir as ir
import pruning
import timing

import qgraph.compiler
import qgraph.ir
from qgraph.pipeline import Pipeline
from qgraph.targets.integer import Integer

__all__ = ["MODELS", "claims", "measure"]

Figures = dict[str, Any]
CLASSIFIERS = ("digits_cnn", "resnet20", "resnet32", "mobilenet_v2", "squeezenet")
SIGNALS = ("silero_vad", "basic_pitch")
SENTENCES = ("minilm_dynamo_sdpa",)
MODELS = (*CLASSIFIERS, *SIGNALS, *SENTENCES)
FLOAT, QDQ, FULL = "float32", "qdq", "full-qdq"
ROUNDINGS = ("half-up", "gemmlowp", "half-even")
POWERS = "full-qdq{scales=pow2}"
QUICK = {"pairs": 300, "samples": 200}


def measure(name: str, *, quick: bool) -> Iterator[Figures]:
    """Yield a row for each form of a model: its score, and the SQNR of its features against the float model's."""
    subject = integer_subjects.SUBJECTS[name]
    task = subject.task
    if quick and isinstance(task, data.Sentences):
        task = dataclasses.replace(task, pairs=QUICK["pairs"])
    feeds = list(task.calibration())
    evaluation = list(_limited(task, QUICK["samples"] if quick else None))
    shapes = subject.shapes if name == "silero_vad" else {}  # recurrent steps are unrolled for a known length
    with tempfile.TemporaryDirectory(prefix="qgraph-integer-") as scratch:
        forms = _forms(task, feeds, shapes, Path(scratch))
        reference = None
        for form, path, seconds in forms:
            session = timing.session(path)
            features = np.concatenate([task.features(session.run(None, feed), feed) for feed in evaluation])
            reference = features if reference is None else reference
            yield {
                "name": name,
                "form": form,
                "samples": len(features),
                "score": task.score(features),
                "sqnr dB": metrics.sqnr_db(reference, features),
                "seconds": seconds,
            }


def _limited(task: data.Task, samples: int | None) -> Iterator[data.Feeds]:
    if samples is None or isinstance(task, data.Sentences):
        return task.evaluation()
    first = next(task.evaluation())
    return itertools.islice(task.evaluation(), -(-samples // len(next(iter(first.values())))))


def _forms(
    task: data.Task, feeds: Sequence[data.Feeds], shapes: Any, folder: Path
) -> Iterator[tuple[str, Path, float]]:
    """Yield name and file of each form, the float model first, and the seconds that it took to make."""
    yield FLOAT, task.model(), 0.0
    start = time.perf_counter()
    made = qgraph.compiler.compile(
        task.model(), "cpu-int8", output=folder / "cpu-int8", calibration=feeds, shapes=shapes or None
    )
    yield "cpu-int8", made.path / "model.onnx", time.perf_counter() - start
    prepared = integer_subjects.fixed(qgraph.ir.load(task.model()), shapes)
    Integer().prepare_passes().run(prepared, calibration=feeds)
    for compress, roundings in ((QDQ, ()), (FULL, ROUNDINGS), (POWERS, ROUNDINGS[:1])):
        start = time.perf_counter()
        model = prepared.clone()
        Pipeline.parse(compress).run(model, calibration=feeds)
        yield compress, _saved(model, folder), time.perf_counter() - start
        for rounding in roundings:
            start = time.perf_counter()
            integers = model.clone()
            text = f"integer-requantize{{rounding={rounding}}},merge-duplicates,remove-unused"
            Pipeline.parse(text).run(integers)
            yield _integer(rounding, compress), _saved(integers, folder), time.perf_counter() - start


def _integer(rounding: str, compress: str = FULL) -> str:
    return f"integer, {rounding}" + (", pow2" if compress == POWERS else "")


def _saved(model: ir.Model, folder: Path) -> Path:
    path = folder / "form.onnx"
    qgraph.ir.save(model, path)
    return path


def claims(rows: Sequence[Figures]) -> list[Figures]:
    """Return what must be reached, for each model that was measured."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        forms = {row["form"]: row for row in rows if row["name"] == name}
        qdq, ours = forms[QDQ], forms[_integer("half-up")]
        if name in CLASSIFIERS:
            lost = qdq["score"] - ours["score"]
            text = f"{ours['score']:.2f} against {qdq['score']:.2f} (cpu-int8 {forms['cpu-int8']['score']:.2f})"
            found.append(pruning.claim(f"{name}, top-1", "within 0.3 of the QDQ model", text, lost <= 0.3 + 1e-9))
        elif name in SIGNALS:
            decibels = {form: row["sqnr dB"] for form, row in forms.items()}
            own, theirs = decibels[_integer("half-up")], decibels[QDQ]
            others = ", ".join(f"{form} {decibels[form]:.1f}" for form in ("cpu-int8", FULL) if form in decibels)
            text = f"{own:.1f} dB against {theirs:.1f} ({others})"
            reached = own >= theirs - 2
            found.append(pruning.claim(f"{name}, SQNR", "within 2 dB of the QDQ model", text, reached))
        else:
            lost = forms[FLOAT]["score"] - ours["score"]
            found.append(pruning.claim(f"{name}, STS-B dev", "loses at most 1.0", f"{lost:+.2f}", lost <= 1.0))
    return found
