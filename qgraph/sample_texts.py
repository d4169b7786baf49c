"""Samples from text: one a line, turned into token numbers by a tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qgraph.errors import UserError
from qgraph.feeds import InputSpec, cast, show_shape
from qgraph.pipeline import Feeds

__all__ = ["TextFile"]

_BATCH = 8
_LONGEST = 512
_FILLED = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class TextFile:
    """A text file as feeds for input_ids and those of attention_mask, token_type_ids, position_ids that the model has.

    A feed is as long as its longest line, or as the input when its shape is fixed. Lines are cut there, at what
    tokenizer.json says, or at 512 tokens. A model without attention_mask gets one line a feed, since nothing would
    tell it what is filling.

    Args:
        path: one sample a line, empty lines aside; in .jsonl a line is a string or an object with "text".
        inputs: what the model takes.
        tokenizer: a tokenizer.json; required.
        batch: lines to a feed where the input leaves that open; 8 when None. Those left over are a smaller feed, or
            are not used if the input is of a fixed batch.

    Raises:
        UserError: the tokenizer, a package or an input is missing, or a file cannot be read.
    """

    def __init__(self, path: Path, inputs: Sequence[InputSpec], tokenizer: Path | None, batch: int | None) -> None:
        if tokenizer is None:
            raise UserError(f"{path} is text: pass --tokenizer tokenizer.json")
        names = {spec.name for spec in inputs}
        for spec in inputs:
            if spec.name not in _FILLED or (spec.shape is not None and len(spec.shape) != 2):
                raise UserError(
                    f"text cannot fill input '{spec.name}' {show_shape(spec.shape)}: "
                    f"only {', '.join(_FILLED)} of [batch, length]"
                )
        if "input_ids" not in names:
            raise UserError("text cannot feed this model: it has no input 'input_ids'")
        self._inputs = inputs
        self._tokenizer = _load_tokenizer(tokenizer)
        self._lines = _read_lines(path)
        fixed_batch, self._length = _fixed(inputs)
        self._batch = fixed_batch or (batch or _BATCH if "attention_mask" in names else 1)
        if fixed_batch:
            self._lines = self._lines[: len(self._lines) // fixed_batch * fixed_batch]
        truncation = self._tokenizer.truncation or {}
        longest = self._length or min(int(truncation.get("max_length", _LONGEST)), _LONGEST)
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(longest)

    def __len__(self) -> int:
        return -(-len(self._lines) // self._batch)

    def feeds(self, indices: Sequence[int]) -> Iterator[Feeds]:
        """See `qgraph.samples.Source`."""
        for index in indices:
            lines = self._lines[index * self._batch : (index + 1) * self._batch]
            encodings = self._tokenizer.encode_batch(lines)
            length = self._length or max(1, *(len(encoding.ids) for encoding in encodings))
            columns = {
                "input_ids": _padded([encoding.ids for encoding in encodings], length, self._filling()),
                "attention_mask": _padded([encoding.attention_mask for encoding in encodings], length, 0),
                "token_type_ids": _padded([encoding.type_ids for encoding in encodings], length, 0),
                "position_ids": np.tile(np.arange(length, dtype=np.int64), (len(lines), 1)),
            }
            yield {spec.name: cast(columns[spec.name], spec, f"'{spec.name}'") for spec in self._inputs}

    def labels(self, name: str | None, indices: Sequence[int]) -> np.ndarray | None:
        """See `qgraph.samples.Source`."""
        del indices
        if name is not None:
            raise UserError(f"a text file has no array '{name}' for labels: put tokens and labels into a .npz file")
        return None

    def _filling(self) -> int:
        for token in ("[PAD]", "<pad>", "</s>", "<|endoftext|>"):
            number = self._tokenizer.token_to_id(token)
            if number is not None:
                return int(number)
        return 0


def _fixed(inputs: Sequence[InputSpec]) -> tuple[int | None, int | None]:
    batch, length = next(spec.shape or (None, None) for spec in inputs if spec.name == "input_ids")
    return batch, length


def _padded(rows: Sequence[Sequence[int]], length: int, filling: int) -> np.ndarray:
    result = np.full((len(rows), length), filling, np.int64)
    for row, numbers in zip(result, rows, strict=True):
        row[: len(numbers)] = numbers
    return result


def _load_tokenizer(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError("reading text needs the package tokenizers: pip install 'qgraph-compiler[text]'") from None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path} is no tokenizer.json that can be read: {error}") from error


def _read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix.lower() == ".jsonl":
        lines = [_json_text(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [line for line in lines if line.strip()]


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: no valid JSON ({error.msg})") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f'{path}, line {number}: must be a string, or an object with "text"')
    return text
