"""Data of the reference models, taken from packages that are installed anyway."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qgraph.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CALIBRATION_SAMPLES", "Dataset", "digits", "digits_dataset"]

CALIBRATION_SAMPLES = 200

_SPLIT_SEED = 0
_TRAINING_IMAGES = 1197


@dataclass(frozen=True)
class Dataset:
    """Input arrays by input name, the first axis being the sample.

    ``calibration`` is drawn from the training part; ``evaluation`` and ``labels`` (class indices, or the next token
    at every position) from the part that training never saw.
    """

    calibration: dict[str, NDArray[np.generic]]
    evaluation: dict[str, NDArray[np.generic]]
    labels: NDArray[np.int64] | None


def digits_dataset() -> Dataset:
    """Return scikit-learn's handwritten digits as ``image`` float32 ``[n, 1, 8, 8]`` in 0..1.

    Raises:
        UserError: scikit-learn is not installed.
    """
    images, labels = digits()
    chosen = np.linspace(0, _TRAINING_IMAGES - 1, CALIBRATION_SAMPLES).astype(np.int64)
    return Dataset(
        calibration={"image": images[chosen]},
        evaluation={"image": images[_TRAINING_IMAGES:]},
        labels=labels[_TRAINING_IMAGES:],
    )


def digits(part: slice = slice(None)) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return ``part`` of all 1797 digits in the fixed random order: images ``[n, 1, 8, 8]`` and labels ``[n]``.

    Raises:
        UserError: scikit-learn is not installed.
    """
    images, labels = _all_digits()
    return images[part], labels[part]


@functools.cache
def _all_digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "the digits come with scikit-learn, which is not installed: pip install 'qgraph-compiler[demo]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    # RandomState, unlike Generator, promises the same stream in every release of numpy.
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(labels))
    images = (pixels[order] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    images.setflags(write=False)
    return images, labels[order].astype(np.int64)
