"""What an output is worth: rank correlation, top-1, average precision, signal to noise. Arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

__all__ = ["agreement", "average_precision_50", "decode_fastestdet", "mean_pool", "spearman_x100", "sqnr_db", "top1"]


def sqnr_db(reference: np.ndarray, result: np.ndarray) -> float:
    """Return the signal-to-quantization-noise ratio in dB; 200 when both are equal."""
    signal = np.square(reference, dtype=np.float64).sum()
    noise = np.square(reference.astype(np.float64) - result).sum()
    if not np.isfinite(noise):
        return float("-inf")
    return 200.0 if noise == 0 else float(min(200.0, 10 * np.log10(max(signal, 1e-300) / noise)))


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the percentage of rows of `logits` [n, classes] whose largest entry is the label."""
    return float(100 * np.mean(logits.reshape(len(labels), -1).argmax(1) == labels))


def agreement(reference: np.ndarray, result: np.ndarray) -> float:
    """Return the percentage of rows whose largest entry is at the same place in both."""
    n = len(reference)
    return float(100 * np.mean(reference.reshape(n, -1).argmax(1) == result.reshape(n, -1).argmax(1)))


def mean_pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return unit vectors [batch, width]: the mean of `hidden` [batch, seq, width] over the tokens of `mask`."""
    weights = mask[..., None].astype(np.float64)
    pooled = (hidden * weights).sum(1) / weights.sum(1)
    return np.asarray(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))


def spearman_x100(embeddings: np.ndarray, gold: np.ndarray) -> float:
    """Return 100 x Spearman's rank correlation of cosine similarity and gold score.

    Args:
        embeddings: unit vectors [2 * pairs, width]: all first sentences, then all second ones.
        gold: the scores [pairs].
    """
    first, second = np.split(embeddings, 2)
    return float(100 * spearmanr((first * second).sum(1), gold).statistic)


def decode_fastestdet(maps: np.ndarray, threshold: float = 0.01, overlap: float = 0.6) -> np.ndarray:
    """Return the detections [n, 6] (class, score, x0, y0, x1, y1, in units of the image) of one output map.

    Args:
        maps: [85, height, width]: objectness, dx and dy before tanh, w and h before the sigmoid, 80 classes;
            score = objectness^0.6 x class^0.4.
        threshold: detections below this score are dropped.
        overlap: within a class, a box that overlaps a better one by more than this is dropped.
    """
    objectness, (dx, dy, w, h), classes = maps[0], maps[1:5], maps[5:]
    rows, columns = np.indices(objectness.shape)
    score = objectness**0.6 * classes.max(0) ** 0.4
    keep = score > threshold
    x, y = (columns + np.tanh(dx))[keep] / objectness.shape[1], (rows + np.tanh(dy))[keep] / objectness.shape[0]
    w, h = 1 / (1 + np.exp(-w[keep])), 1 / (1 + np.exp(-h[keep]))
    boxes = np.stack([classes.argmax(0)[keep], score[keep], x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1)
    boxes = boxes[np.argsort(-boxes[:, 1], kind="stable")]
    kept: list[np.ndarray] = []
    for box in boxes:
        rivals = np.array([other for other in kept if other[0] == box[0]])
        if len(rivals) == 0 or _overlaps(box[2:], rivals[:, 2:]).max() <= overlap:
            kept.append(box)
    return np.array(kept).reshape(-1, 6)


def _overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersection over union of `box` [4] with each of `others` [n, 4] (corners)."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[2:], others[:, 2:])
    shared = np.clip(high - low, 0, None).prod(1)
    area = (box[2:] - box[:2]).prod()
    areas = (others[:, 2:] - others[:, :2]).prod(1)
    return np.asarray(shared / np.maximum(area + areas - shared, 1e-12))


def average_precision_50(found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """Return COCO's 101-point average precision x100 at an overlap of 0.5, the mean over the classes that occur.

    Args:
        found: for each image, detections [n, 6] as `decode_fastestdet` returns them.
        truth: for each image, boxes [m, 5] (class, x0, y0, x1, y1).
    """
    present = sorted({int(box[0]) for boxes in truth for box in boxes})
    return float(100 * np.mean([_class_precision(kind, found, truth) for kind in present]))


def _class_precision(kind: int, found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    expected = [boxes[boxes[:, 0] == kind, 1:] for boxes in truth]
    total = sum(map(len, expected))
    taken = [np.zeros(len(boxes), bool) for boxes in expected]
    ranked = sorted(
        ((box[1], image, box[2:]) for image, boxes in enumerate(found) for box in boxes if box[0] == kind),
        key=lambda one: -one[0],
    )
    hits = np.zeros(len(ranked))
    for rank, (_, image, box) in enumerate(ranked):
        if len(expected[image]) == 0:
            continue
        overlaps = np.where(taken[image], 0, _overlaps(box, expected[image]))
        best = int(overlaps.argmax())
        if overlaps[best] >= 0.5:
            taken[image][best] = True
            hits[rank] = 1
    if not len(hits):
        return 0.0
    recall = hits.cumsum() / total
    precision = np.maximum.accumulate((hits.cumsum() / np.arange(1, len(hits) + 1))[::-1])[::-1]
    places = np.searchsorted(recall, np.linspace(0, 1, 101))
    return float(np.append(precision, 0)[places].mean())
