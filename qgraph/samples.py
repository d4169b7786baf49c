"""Calibration and verification data, from whatever they come in.

    samples = open_samples("images/", signature(model), preprocess="imagenet")
    calibration, held_back = split(samples, 0.2, seed=0)

A sample set is lazy, can be gone through again, and always gives the same feeds in the same order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qgraph.errors import UserError
from qgraph.feeds import LABELS, InputSpec, conform_feed, quoted, signature
from qgraph.pipeline import Feeds
from qgraph.user_code import load_function

__all__ = ["InputSpec", "SampleSet", "Source", "open_samples", "signature", "split"]

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Source(Protocol):
    """Where the feeds of a sample set come from."""

    def __len__(self) -> int:
        """Return the number of feeds."""
        ...

    def feeds(self, indices: Sequence[int]) -> Iterator[Feeds]:
        """Yield the feeds of these indices, which increase."""
        ...

    def labels(self, name: str | None, indices: Sequence[int]) -> np.ndarray | None:
        """Return the labels of these feeds, one a row, from the array `name`; None when none was asked for by name.

        Raises:
            UserError: there is no array of that name.
        """
        ...


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """Some of a source's feeds, in order: what `qgraph.pipeline.Samples` asks for, and labels."""

    source: Source
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Feeds]:
        return self.source.feeds(self.indices)

    def labels(self, name: str | None = None) -> np.ndarray | None:
        """Return the labels of these feeds, one a row, or None when the data hold none.

        Raises:
            UserError: `name` is given, and the data have no such array.
        """
        return self.source.labels(name, self.indices)


def open_samples(
    source: str | Path | Iterable[Feeds],
    inputs: Sequence[InputSpec],
    *,
    preprocess: str | None = None,
    tokenizer: Path | None = None,
    rename: Mapping[str, str] | None = None,
    batch: int | None = None,
    limit: int | None = None,
    window: int | None = None,
) -> SampleSet:
    """Open data for the inputs of a model.

    Args:
        source: one of
            a .npz file, whose arrays are named as the inputs; an array's first axis counts the samples (an input
            [1, 3, 8, 8] takes [n, 3, 8, 8] or [n, 1, 3, 8, 8]), a 0-d array goes into every feed;
            a folder of .npz files, one feed each, in the order of their names;
            a folder of images, in the order of their names, with `preprocess`;
            a text file, one sample a line (.jsonl: a string or an object with "text" a line), with `tokenizer`; with
            `window`, or for a model that takes a cache of keys and values, windows of the whole text;
            `module:callable`, where the callable takes nothing and returns an iterable of feeds, equal at every call;
            an iterable of feeds.
        inputs: what `signature` gives.
        preprocess: name of a preset, for images and for arrays of uint8 images.
        tokenizer: a tokenizer.json, or `bytes`.
        rename: name of an array -> name of the input that it is for.
        batch: samples to a feed, where the first axis of the inputs is dynamic; 8 for lines and 1 otherwise.
        limit: use at most so many feeds, spread evenly.
        window: cut text into windows of so many tokens.

    Raises:
        UserError: the data cannot be read, do not fit the inputs, or are empty, or a package is missing.
    """
    opened = _open(source, inputs, preprocess, tokenizer, dict(rename or {}), batch, window)
    count = len(opened)
    if count == 0:
        raise UserError(f"{_name(source)} holds no samples: at least one is needed")
    if limit is None or limit >= count:
        return SampleSet(opened, tuple(range(count)))
    if limit < 1:
        raise UserError(f"the number of samples must be positive, not {limit}")
    return SampleSet(opened, tuple((2 * number + 1) * count // (2 * limit) for number in range(limit)))


def split(samples: SampleSet, held_back_share: float, seed: int = 0) -> tuple[SampleSet, SampleSet]:
    """Split into samples to calibrate on and samples held back for verification.

    The held-back ones are spread evenly: one, drawn with `seed`, out of each of equal stretches. Both parts keep the
    order, and neither is empty; a single sample serves as both.

    Raises:
        ValueError: the share is not between 0 and 1.
    """
    if not 0.0 < held_back_share < 1.0:
        raise ValueError(f"the share to hold back must lie between 0 and 1, not be {held_back_share}")
    count = len(samples)
    if count < 2:
        return samples, samples
    held = min(max(1, round(count * held_back_share)), count - 1)
    random = np.random.default_rng(seed)
    chosen = {int(random.integers(part * count // held, (part + 1) * count // held)) for part in range(held)}
    return (
        SampleSet(samples.source, tuple(one for place, one in enumerate(samples.indices) if place not in chosen)),
        SampleSet(samples.source, tuple(one for place, one in enumerate(samples.indices) if place in chosen)),
    )


def _name(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else "the calibration data"


def _open(
    source: str | Path | Iterable[Feeds],
    inputs: Sequence[InputSpec],
    preprocess: str | None,
    tokenizer: Path | None,
    rename: dict[str, str],
    batch: int | None,
    window: int | None,
) -> Source:
    if batch is not None and batch < 1:
        raise UserError(f"the batch must be positive, not {batch}")
    if not isinstance(source, str | Path):
        return _Feeds(_again(source), inputs, rename, "")
    if isinstance(source, str) and _CALLABLE.fullmatch(source) and not Path(source).exists():
        return _Feeds(_called(source), inputs, rename, f"{source}: ")
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        return _open_folder(path, inputs, preprocess, rename, batch)
    if path.suffix.lower() == ".npz":
        if tokenizer is not None or window:
            raise UserError(f"{path} holds arrays, but a tokenizer and a window are for text: leave them out")
        from qgraph.sample_arrays import NpzFile

        return NpzFile(path, inputs, rename, preprocess, batch or 1)
    if path.suffix.lower() in (".txt", ".jsonl") or tokenizer is not None:
        from qgraph.sample_texts import open_text

        return open_text(path, inputs, tokenizer, batch, window)
    raise UserError(
        f"{path} is no data that can be read: give a .npz, .txt or .jsonl file, a folder, or module:callable"
    )


def _open_folder(
    path: Path, inputs: Sequence[InputSpec], preprocess: str | None, rename: dict[str, str], batch: int | None
) -> Source:
    from qgraph.sample_arrays import NpzFolder
    from qgraph.sample_images import ImageFolder, image_files

    files = sorted(path.glob("*.npz"))
    if files:
        return NpzFolder(files, inputs, rename)
    images = image_files(path)
    if images:
        return ImageFolder(images, inputs, preprocess, batch or 1)
    raise UserError(f"{path} holds neither .npz files nor images")


def _again(feeds: Iterable[Any]) -> Callable[[], Iterable[Any]]:
    """Return something that gives the feeds anew at every call; what can be gone through only once is kept."""
    kept = list(feeds) if isinstance(feeds, Iterator) else feeds
    return lambda: kept


def _called(path: str) -> Callable[[], Iterable[Any]]:
    found = load_function(path, "a function that yields feeds")
    return lambda: _guarded(path, found)


def _guarded(path: str, function: Callable[[], Any]) -> Any:
    """Call the user's function; what goes wrong in it, now or while it yields, is the user's to mend."""
    try:
        feeds = function()
    except Exception as error:
        raise UserError(f"{path} failed: {type(error).__name__}: {error}") from error
    return _guarded_iterator(path, feeds) if isinstance(feeds, Iterator) else feeds


def _guarded_iterator(path: str, feeds: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from feeds
    except Exception as error:
        raise UserError(f"{path} failed: {type(error).__name__}: {error}") from error


class _Feeds:
    """Feeds made by Python."""

    def __init__(
        self, again: Callable[[], Iterable[Any]], inputs: Sequence[InputSpec], rename: dict[str, str], where: str
    ) -> None:
        self._again = again
        self._inputs = inputs
        self._rename = rename
        self._where = where
        feeds = again()
        if not isinstance(feeds, Iterable):
            raise UserError(f"{where or 'the calibration data'} must give feeds, not {type(feeds).__name__}")
        for index, feed in enumerate(feeds):
            self._conform(index, feed)
            break
        self._count = len(feeds) if isinstance(feeds, Sized) else sum(1 for _ in again())

    def __len__(self) -> int:
        return self._count

    def feeds(self, indices: Sequence[int]) -> Iterator[Feeds]:
        wanted = set(indices)
        for index, feed in enumerate(self._again()):
            if index in wanted:
                yield self._conform(index, feed)

    def labels(self, name: str | None, indices: Sequence[int]) -> np.ndarray | None:
        wanted = set(indices)
        key = name or LABELS
        rows = []
        for index, feed in enumerate(self._again()):
            if key not in feed:
                if name is None:
                    return None
                raise UserError(f"{self._where}feed {index} has no '{key}' (it has: {quoted(feed)})")
            if index in wanted:
                rows.append(np.atleast_1d(np.asarray(feed[key])))
        return np.concatenate(rows) if rows else None

    def _conform(self, index: int, feed: object) -> Feeds:
        where = f"{self._where}feed {index}"
        if not isinstance(feed, Mapping):
            raise UserError(f"{where} is {type(feed).__name__}, not a dictionary from input name to array")
        return conform_feed(
            {self._rename.get(str(name), str(name)): value for name, value in feed.items()}, self._inputs, where
        )
