"""What the integer benchmark measures on: the real models of `data`, the shipped ones, and the shapes that code needs.

Code in C, or from TVM, is for one shape; `Subject` fixes it, and gives samples of that shape one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import data
import language
import metrics
import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph import models
from qgraph.models.__main__ import export

__all__ = ["SUBJECTS", "Digits", "Subject", "Text", "fixed"]

TOKENS = 16
"""Length to which sentences and texts are cut or filled up for code of one shape."""


@dataclass(frozen=True)
class Digits(data.Task):
    """A model that ships with qgraph, on scikit-learn's handwritten digits."""

    metric = "top-1 %"
    batch: int = 50

    def model(self) -> Path:
        """Return the path of the exported model in the cache folder, made on first use."""
        path = data.cache_folder() / "benchmarks" / f"{self.name}.onnx"
        if not path.is_file():
            export(self.name, path.parent)
        return path

    def calibration(self) -> Iterator[data.Feeds]:
        yield from self._batches(models.dataset(self.name).calibration)

    def evaluation(self) -> Iterator[data.Feeds]:
        yield from self._batches(models.dataset(self.name).evaluation)

    def score(self, features: np.ndarray) -> float:
        labels = models.dataset(self.name).labels
        assert labels is not None
        return metrics.top1(features, labels[: len(features)])

    def _batches(self, arrays: Mapping[str, np.ndarray]) -> Iterator[data.Feeds]:
        count = len(next(iter(arrays.values())))
        for start in range(0, count, self.batch):
            yield {name: np.asarray(array[start : start + self.batch]) for name, array in arrays.items()}


@dataclass(frozen=True)
class Text(data.Task):
    """A decoder of `language`, on windows of `TOKENS` tokens; judged by how near its logits stay."""

    def model(self) -> Path:
        """Return the path of the model; that of a shipped one is in the cache folder, made on first use."""
        if self.file:
            return super().model()
        path = data.cache_folder() / "benchmarks" / f"{self.name}.onnx"
        if not path.is_file():
            export(self.name, path.parent)
        return path

    def calibration(self) -> Iterator[data.Feeds]:
        for feed in language.MODELS[self.name](1).calibration:
            yield from self._windows(feed["input_ids"])

    def evaluation(self) -> Iterator[data.Feeds]:
        for document in language.MODELS[self.name](None).documents:
            yield from self._windows(np.asarray(document, np.int64)[None])

    @staticmethod
    def _windows(ids: np.ndarray) -> Iterator[data.Feeds]:
        for start in range(0, ids.shape[1] - TOKENS + 1, TOKENS):
            yield {"input_ids": ids[:, start : start + TOKENS]}


@dataclass(frozen=True)
class Subject:
    """A model of one shape.

    Attributes:
        task: the model and its data.
        shapes: input -> dimensions, for inputs whose dimensions are not fixed already.
        calibrate: samples that the ranges are taken from.
    """

    task: data.Task
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    calibrate: int = 32

    def model(self) -> ir.Model:
        """Return the float model, of fixed shapes."""
        return fixed(qgraph.ir.load(self.task.model()), self.shapes)

    def calibration(self) -> list[data.Feeds]:
        """Return the first samples of the calibration."""
        return list(itertools.islice(self._singles(self.task.calibration()), self.calibrate))

    def samples(self, count: int) -> list[data.Feeds]:
        """Return up to `count` samples: of the evaluation first, and of the calibration where these are too few."""
        both = itertools.chain(self.task.evaluation(), self.task.calibration())
        return list(itertools.islice(self._singles(both), count))

    def _singles(self, feeds: Iterator[data.Feeds]) -> Iterator[data.Feeds]:
        for feed in feeds:
            if isinstance(self.task, data.Sentences):
                feed = {name: _of_length(array, TOKENS) for name, array in feed.items()}
            batch = len(next(iter(feed.values())))
            if batch == 1:
                yield feed
                continue
            for index in range(batch):
                yield {name: array[index : index + 1] for name, array in feed.items()}


def _of_length(array: np.ndarray, length: int) -> np.ndarray:
    """Return [batch, any] cut, or filled up with zeros, to [batch, length]."""
    cut = array[:, :length]
    return np.pad(cut, ((0, 0), (0, length - cut.shape[1])))


def fixed(model: ir.Model, shapes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """Fix the shapes of a model's inputs, in place, and return it."""
    for name, shape in shapes.items():
        qgraph.ir.set_input_shape(model, name, shape)
    return model


_SENTENCE = {"input_ids": (1, TOKENS), "attention_mask": (1, TOKENS)}
_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "resnet20": {"input": (1, 3, 32, 32)},
    "resnet32": {"input": (1, 3, 32, 32)},
    "mobilenet_v2": {"input": (1, 3, 224, 224)},
    "silero_vad": {"input": (1, 576), "state": (2, 1, 128)},
    "basic_pitch": {"serving_default_input_2:0": (1, 43844, 1)},
}
_CALIBRATE = {"mobilenet_v2": 16, "squeezenet": 16, "fastestdet": 16, "face_rfb320": 16, "basic_pitch": 6}

SUBJECTS: dict[str, Subject] = {
    **{
        name: Subject(Digits(name, ""), {"image": (1, 1, 8, 8)})
        for name in ("digits_cnn", "digits_encoder", "digits_mobilenet")
    },
    **{
        name: Subject(
            task,
            _SENTENCE if isinstance(task, data.Sentences) else _SHAPES.get(name, {}),
            _CALIBRATE.get(name, 32),
        )
        for name, task in sorted(data.TASKS.items(), key=lambda item: isinstance(item[1], data.Sentences))
    },
    "stories260k": Subject(Text("stories260k", "stories260k/stories260K.onnx"), {"input_ids": (1, TOKENS)}),
    "pydoc_decoder": Subject(Text("pydoc_decoder", ""), {"input_ids": (1, TOKENS)}),
}
"""By name: the shipped ones of digits, the real ones with the sentence encoders last, the decoders."""
