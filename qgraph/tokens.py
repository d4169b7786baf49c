"""From text to token numbers: files read as documents, and the tokenizers that number them.

A tokenizer is a `tokenizer.json` (of the package tokenizers), or the word `bytes` for models over bytes, whose tokens
are those of the UTF-8 text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qgraph.errors import UserError

__all__ = ["BYTES", "Tokenized", "Tokenizer", "load_tokenizer", "open_tokenizer", "read_documents", "read_lines"]

BYTES = "bytes"
"""Given instead of a file, it names the tokenizer whose tokens are the bytes of UTF-8."""

_BYTE_VALUES = 256


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """A document in numbers.

    Attributes:
        ids: int64 [tokens], with what the tokenizer puts before and after every text.
        bytes: of the text in UTF-8.
        added: how many of the tokens stand for no text, such as the one that begins every text.
    """

    ids: np.ndarray
    bytes: int
    added: int


class Tokenizer(Protocol):
    """Something that numbers texts."""

    vocabulary: int
    """Number of tokens, without those added to the trained ones."""

    def encode(self, texts: Sequence[str]) -> list[Tokenized]:
        """Number each text by itself, whole."""
        ...


class _ByteTokenizer:
    vocabulary = _BYTE_VALUES

    def encode(self, texts: Sequence[str]) -> list[Tokenized]:
        encoded = [text.encode() for text in texts]
        return [Tokenized(np.frombuffer(one, np.uint8).astype(np.int64), len(one), 0) for one in encoded]


class _JsonTokenizer:
    def __init__(self, path: Path) -> None:
        self._tokenizer = load_tokenizer(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocabulary = int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    def encode(self, texts: Sequence[str]) -> list[Tokenized]:
        encodings = self._tokenizer.encode_batch(list(texts))
        return [
            Tokenized(np.array(one.ids, np.int64), len(text.encode()), sum(one.special_tokens_mask))
            for one, text in zip(encodings, texts, strict=True)
        ]


def open_tokenizer(tokenizer: str | Path) -> Tokenizer:
    """Open a tokenizer.json, or the tokenizer of bytes when the name is `bytes` and no such file is there.

    Raises:
        UserError: it cannot be read, or the package tokenizers is missing.
    """
    path = Path(tokenizer)
    return _ByteTokenizer() if str(path) == BYTES and not path.exists() else _JsonTokenizer(path)


def load_tokenizer(path: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a file.

    Raises:
        UserError: it cannot be read, or the package tokenizers is missing.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError("reading text needs the package tokenizers: pip install 'qgraph-compiler[text]'") from None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path} is no tokenizer.json that can be read: {error}") from error


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text that are not empty; in .jsonl a line is a string or an object with "text".

    Raises:
        UserError: the file cannot be read as UTF-8 text, or a line of .jsonl is something else.
    """
    lines = _read(path).splitlines()
    if path.suffix.lower() == ".jsonl":
        lines = [_json_text(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [line for line in lines if line.strip()]


def read_documents(path: Path) -> list[str]:
    """Return the texts that belong together: each line of a .jsonl, or the whole of any other file.

    Raises:
        UserError: the file cannot be read as UTF-8 text, or a line of .jsonl is something else.
    """
    if path.suffix.lower() == ".jsonl":
        return read_lines(path)
    text = _read(path)
    return [text] if text.strip() else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: no valid JSON ({error.msg})") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f'{path}, line {number}: must be a string, or an object with "text"')
    return text
