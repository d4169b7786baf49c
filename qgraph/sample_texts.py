"""Samples from text: one a line, or windows of a fixed number of tokens, numbered by a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from qgraph.errors import UserError
from qgraph.feeds import InputSpec
from qgraph.pipeline import Feeds
from qgraph.token_feeds import TokenInputs
from qgraph.tokens import BYTES, Tokenizer, load_tokenizer, open_tokenizer, read_documents, read_lines

__all__ = ["TextLines", "TextWindows", "open_text"]

_BATCH = 8
_LONGEST = 512


def open_text(
    path: Path, inputs: Sequence[InputSpec], tokenizer: Path | None, batch: int | None, window: int | None = None
) -> TextLines | TextWindows:
    """Open a text file: as windows when `window` is given or the model takes a cache of keys and values, else as lines.

    Raises:
        UserError: the tokenizer, a package or an input is missing, a file cannot be read, the text is shorter than
            one window, or a token is beyond the model's vocabulary.
    """
    if tokenizer is None:
        raise UserError(f"{path} is text: pass --tokenizer tokenizer.json")
    takes = TokenInputs(inputs)
    if window is None and not takes.cached and tokenizer != Path(BYTES):
        return TextLines(path, takes, tokenizer, batch)
    if window is not None and takes.length not in (None, window):
        raise UserError(f"the model reads {takes.length} tokens at once: a window of {window} does not fit")
    return TextWindows(path, takes, open_tokenizer(tokenizer), batch, takes.length or window or _LONGEST)


class TextWindows:
    """A text as consecutive windows of equally many tokens, as language models are calibrated.

    The documents of a .jsonl follow one another. What is left over after the last window, or the last feed of a fixed
    batch, is not used.

    Args:
        path: one document, or a .jsonl with one in each line.
        inputs: what the model takes.
        tokenizer: numbers the text.
        batch: windows to a feed where the model leaves that open; 1 when None.
        window: tokens to a window.

    Raises:
        UserError: the text cannot be read or is shorter than one window, or the model does not know a token.
    """

    def __init__(self, path: Path, inputs: TokenInputs, tokenizer: Tokenizer, batch: int | None, window: int) -> None:
        if window < 1:
            raise UserError(f"a window must have at least 1 token, not {window}")
        documents = [one.ids for one in tokenizer.encode(read_documents(path))]
        ids = np.concatenate([np.empty(0, np.int64), *documents])
        inputs.check_vocabulary(ids, f"{path} as its tokenizer numbers it")
        self._batch = inputs.batch or batch or 1
        needed = window * self._batch
        if len(ids) < needed and (len(ids) < window or inputs.batch):
            windows = f"one window of {window}" if self._batch == 1 else f"a feed of {self._batch} windows of {window}"
            raise UserError(
                f"{path} has {len(ids)} tokens, too few for {windows}: give more text, or a smaller --window"
            )
        count = len(ids) // window
        if inputs.batch:
            count -= count % self._batch
        self._inputs = inputs
        self._windows = ids[: count * window].reshape(count, window)

    def __len__(self) -> int:
        return -(-len(self._windows) // self._batch)

    def feeds(self, indices: Sequence[int]) -> Iterator[Feeds]:
        """See `qgraph.samples.Source`."""
        for index in indices:
            yield self._inputs.feed(self._windows[index * self._batch : (index + 1) * self._batch])

    def labels(self, name: str | None, indices: Sequence[int]) -> np.ndarray | None:
        """See `qgraph.samples.Source`."""
        del indices
        _refuse_labels(name)
        return None


class TextLines:
    """A text file as feeds for input_ids and those of attention_mask, token_type_ids, position_ids that the model has.

    A feed is as long as its longest line, or as the input when its shape is fixed. Lines are cut there, at what
    tokenizer.json says, or at 512 tokens. A model without attention_mask gets one line a feed, since nothing would
    tell it what is filling.

    Args:
        path: one sample a line, empty lines aside; in .jsonl a line is a string or an object with "text".
        inputs: what the model takes.
        tokenizer: a tokenizer.json.
        batch: lines to a feed where the input leaves that open; 8 when None. Those left over are a smaller feed, or
            are not used if the input is of a fixed batch.

    Raises:
        UserError: the tokenizer or a package is missing, or a file cannot be read.
    """

    def __init__(self, path: Path, inputs: TokenInputs, tokenizer: Path, batch: int | None) -> None:
        self._path = path
        self._inputs = inputs
        self._tokenizer = load_tokenizer(tokenizer)
        self._lines = read_lines(path)
        self._batch = inputs.batch or (batch or _BATCH if inputs.masked else 1)
        if inputs.batch:
            self._lines = self._lines[: len(self._lines) // inputs.batch * inputs.batch]
        truncation = self._tokenizer.truncation or {}
        longest = inputs.length or min(int(truncation.get("max_length", _LONGEST)), _LONGEST)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(longest)

    def __len__(self) -> int:
        return -(-len(self._lines) // self._batch)

    def feeds(self, indices: Sequence[int]) -> Iterator[Feeds]:
        """See `qgraph.samples.Source`."""
        for index in indices:
            lines = self._lines[index * self._batch : (index + 1) * self._batch]
            encodings = self._tokenizer.encode_batch(lines)
            length = self._inputs.length or max(1, *(len(encoding.ids) for encoding in encodings))
            ids = _padded([encoding.ids for encoding in encodings], length, self._filling())
            self._inputs.check_vocabulary(ids, f"{self._path} as its tokenizer numbers it")
            yield self._inputs.feed(
                ids,
                _padded([encoding.attention_mask for encoding in encodings], length, 0),
                _padded([encoding.type_ids for encoding in encodings], length, 0),
            )

    def labels(self, name: str | None, indices: Sequence[int]) -> np.ndarray | None:
        """See `qgraph.samples.Source`."""
        del indices
        _refuse_labels(name)
        return None

    def _filling(self) -> int:
        for token in ("[PAD]", "<pad>", "</s>", "<|endoftext|>"):
            number = self._tokenizer.token_to_id(token)
            if number is not None:
                return int(number)
        return 0


def _refuse_labels(name: str | None) -> None:
    if name is not None:
        raise UserError(f"a text file has no array '{name}' for labels: put tokens and labels into a .npz file")


def _padded(rows: Sequence[Sequence[int]], length: int, filling: int) -> np.ndarray:
    result = np.full((len(rows), length), filling, np.int64)
    for row, numbers in zip(result, rows, strict=True):
        row[: len(numbers)] = numbers
    return result
