"""From token numbers to feeds: the inputs that language models have under names everybody uses.

input_ids                     [batch, length]          the tokens
attention_mask                [batch, length]          1 for a token, 0 for filling
position_ids                  [batch, length]          0, 1, 2 ...
token_type_ids                [batch, length]          0
past_key_values.0.key ...     [batch, heads, 0, size]  a cache of keys and values, empty
use_cache_branch              [1]                      false: the part of the graph that needs no cache
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qgraph.errors import UserError
from qgraph.feeds import InputSpec, cast, show_shape
from qgraph.pipeline import Feeds

__all__ = ["TokenInputs"]

_FILLED = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_PAST = "past"
_BRANCH = "use_cache_branch"


class TokenInputs:
    """The inputs of a model that takes tokens.

    Attributes:
        batch: sequences in a feed, or None where that is open.
        length: tokens in a sequence, or None where that is open.
        masked: whether the model is told which tokens are filling.
        cached: whether the model takes a cache of keys and values.
        vocabulary: how many tokens the model knows, or None where the graph does not tell.

    Raises:
        UserError: there is no input_ids, or an input that tokens cannot fill.
    """

    def __init__(self, inputs: Sequence[InputSpec]) -> None:
        for spec in inputs:
            _check(spec)
        named = {spec.name: spec for spec in inputs}
        if "input_ids" not in named:
            raise UserError("text cannot feed this model: it has no input 'input_ids'")
        self._inputs = tuple(inputs)
        self.batch, self.length = named["input_ids"].shape or (None, None)
        self.vocabulary = named["input_ids"].below
        self.masked = "attention_mask" in named
        self.cached = any(name.startswith(_PAST) for name in named)

    def feed(self, ids: np.ndarray, mask: np.ndarray | None = None, types: np.ndarray | None = None) -> Feeds:
        """Return the feed for some sequences of one length.

        Args:
            ids: int64 [batch, length].
            mask: of the same shape, 0 for filling; all ones when None.
            types: the token types, of the same shape; all zeros when None.

        Raises:
            UserError: a number does not fit the input's type.
        """
        columns = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids) if mask is None else mask,
            "token_type_ids": np.zeros_like(ids) if types is None else types,
            "position_ids": np.tile(np.arange(ids.shape[1], dtype=np.int64), (len(ids), 1)),
        }
        return {
            spec.name: cast(columns[spec.name], spec, f"'{spec.name}'")
            if spec.name in columns
            else self._empty(spec, len(ids))
            for spec in self._inputs
        }

    def check_vocabulary(self, ids: np.ndarray, where: str) -> None:
        """Refuse tokens that the model does not know.

        Args:
            ids: token numbers, of any shape.
            where: names them in the error.

        Raises:
            UserError: there is one.
        """
        if self.vocabulary is not None and ids.size and ids.max() >= self.vocabulary:
            raise UserError(
                f"{where} has token {ids.max()}, but the model only those below {self.vocabulary}: "
                "the tokenizer belongs to another model"
            )

    def _empty(self, spec: InputSpec, batch: int) -> np.ndarray:
        if spec.name == _BRANCH:
            return np.zeros([size or 1 for size in spec.shape or ()], spec.dtype)
        shape = [size if size is not None else 0 for size in spec.shape or ()]
        if self.batch is None:
            shape[(spec.shape or ()).index(None)] = batch
        return np.zeros(shape, spec.dtype)


def _check(spec: InputSpec) -> None:
    if spec.name == _BRANCH:
        return
    if spec.name.startswith(_PAST):
        shape = spec.shape
        if shape is None or len(shape) not in (4, 5) or not 1 <= shape.count(None) <= 2:
            raise UserError(
                f"input '{spec.name}' {show_shape(spec.shape)} cannot be filled with an empty cache: its shape must be "
                "[batch, heads, past, size] with heads and size fixed and past open"
            )
        return
    if spec.name not in _FILLED or (spec.shape is not None and len(spec.shape) != 2):
        raise UserError(
            f"text cannot fill input '{spec.name}' {show_shape(spec.shape)}: "
            f"only {', '.join(_FILLED)} of [batch, length], and an empty cache past_key_values"
        )
