"""Perplexity of language models over a text, by the strided protocol that the field compares with.

    text     t0 t1 t2 t3 t4 t5 t6 t7 t8 t9        window 4, stride 2
    window 1 .. [t1 t2 t3]                         the first token has nothing before it
    window 2       .. .. [t4 t5]                   context, then the tokens that are scored
    window 3             .. .. [t6 t7]
    window 4                   .. .. [t8 t9]

Each token is scored once, with at least `window - stride` tokens before it, but at the beginning of a document. With
stride = window the windows do not overlap, and the first token of each is not scored. This is how Hugging Face's
"Perplexity of fixed-length models" counts.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import qgraph.ir
from qgraph.artifact import open_artifact
from qgraph.errors import UserError
from qgraph.feeds import InputSpec, signature
from qgraph.runtime.session import TensorSpec, first_line, input_signature, open_session, output_signature
from qgraph.targets.base import Session
from qgraph.token_feeds import TokenInputs
from qgraph.tokens import open_tokenizer, read_documents

__all__ = ["WINDOW", "Perplexity", "perplexity", "text_perplexity"]

WINDOW = 512
"""Tokens in a window where neither the caller nor the model says how many."""

_LOGITS = "logits"
_LARGEST_BATCH = 16
_LOGITS_BYTES = 1 << 27


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        nats: mean negative log-likelihood of a token, in nats.
        tokens: number of tokens that were scored.
        windows: number of times that the model read a window.
        window: tokens in a window, at most.
        stride: tokens from the beginning of one window to that of the next.
        seconds: that it took.
        bytes_per_token: of the text, in UTF-8; None where only token numbers are known.
    """

    nats: float
    tokens: int
    windows: int
    window: int
    stride: int
    seconds: float
    bytes_per_token: float | None = None

    @property
    def perplexity(self) -> float:
        """The exponential of `nats`; infinite where that is too large for a float."""
        return math.exp(self.nats) if self.nats < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of the text: comparable between tokenizers."""
        return None if self.bytes_per_token is None else self.nats / math.log(2) / self.bytes_per_token

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; an infinite perplexity is null."""
        value = self.perplexity
        figures = {"perplexity": value if math.isfinite(value) else None, "bits_per_byte": self.bits_per_byte}
        return {**figures, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class _Window:
    """Tokens of a document, and from which of them on they are scored (counted in the window, never 0)."""

    ids: np.ndarray
    first: int


@dataclasses.dataclass(frozen=True)
class _Model:
    """What runs, what it takes, and where the logits come out."""

    session: Session
    inputs: TokenInputs
    logits: str
    vocabulary: int | None

    @classmethod
    def of(cls, model: Any, threads: int) -> _Model:
        if not isinstance(model, str | Path):
            specs: Sequence[InputSpec] = [_input(spec) for spec in input_signature(model)]
            return cls(model, TokenInputs(specs), *_logits(output_signature(model)))
        path = Path(model)
        if not path.is_dir():
            loaded = qgraph.ir.load(path)
            runtime = open_session(path, threads=threads)
            inputs = TokenInputs(signature(loaded))
            name, vocabulary = _logits(output_signature(runtime))
            return cls(runtime, inputs, name, vocabulary or inputs.vocabulary)
        artifact = open_artifact(path)
        specs = [_input(TensorSpec(**one)) for one in artifact.manifest["inputs"]]
        session = artifact.session(threads=threads)
        named = [TensorSpec(name, "float32", []) for name in artifact.manifest["outputs"]]
        outputs = output_signature(session) if hasattr(session, "get_outputs") else named
        return cls(session, TokenInputs(specs), *_logits(outputs))

    def run(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the logits [batch, length, vocabulary] of tokens int64 [batch, length]."""
        try:
            (logits,) = self.session.run([self.logits], self.inputs.feed(ids, mask))
        except (UserError, MemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"the model cannot run a window of {ids.shape[1]} tokens: {first_line(error)}. "
                "If it knows fewer positions, pass a smaller --window."
            ) from error
        return np.asarray(logits)


def perplexity(
    model: Session | str | Path,
    ids: np.ndarray | Sequence[int] | Sequence[np.ndarray],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    text_bytes: int | None = None,
    threads: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Perplexity:
    """Score token numbers.

    Args:
        model: an artifact, an ONNX model, or an open session of ONNX Runtime. It takes `input_ids`, and those of
            attention_mask, position_ids, token_type_ids and past_key_values that it has; its output `logits` (or else
            the first one) is [batch, length, vocabulary].
        ids: integers [tokens], or a list of such arrays: documents, which windows do not cross.
        window: tokens that the model reads at once; by default as many as its input is fixed to, or 512.
        stride: see above; by default half a window.
        batch: windows to a feed; by default as many as keep the logits under 128 MiB, at most 16.
        text_bytes: length of the text in UTF-8, for bits per byte.
        threads: of the runtime; 0 lets it choose.
        progress: called with "perplexity", windows done and windows in all.

    Raises:
        UserError: the model takes no tokens or cannot run, window or stride do not fit, no document has two tokens, a
            token is beyond the model's vocabulary, or logits are not finite.
    """
    runner, documents = _Model.of(model, threads), _documents(ids)
    result = _evaluate(runner, documents, window, stride, batch, progress)
    if text_bytes is None:
        return result
    return dataclasses.replace(result, bytes_per_token=text_bytes / sum(len(one) for one in documents))


def text_perplexity(
    model: Session | str | Path,
    text: str | Path,
    tokenizer: str | Path,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    threads: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Perplexity:
    """Score a text file; see `perplexity`.

    Args:
        model: as there.
        text: UTF-8, one document; in .jsonl each line is a document: a string, or an object with "text".
        tokenizer: a tokenizer.json, or `bytes`.
        window: as there.
        stride: as there.
        batch: as there.
        threads: as there.
        progress: as there.

    Raises:
        UserError: as there; or the text or the tokenizer cannot be read, or has more tokens than the model.
    """
    numbering = open_tokenizer(tokenizer)
    runner = _Model.of(model, threads)
    if runner.vocabulary is not None and numbering.vocabulary > runner.vocabulary:
        raise UserError(
            f"the tokenizer {tokenizer} has {numbering.vocabulary} tokens and the model {runner.vocabulary}: "
            "they do not belong together"
        )
    documents = numbering.encode(read_documents(Path(text)))
    result = _evaluate(runner, [one.ids for one in documents], window, stride, batch, progress)
    written = sum(len(one.ids) - one.added for one in documents)
    return dataclasses.replace(result, bytes_per_token=sum(one.bytes for one in documents) / max(written, 1))


def _evaluate(
    model: _Model,
    documents: Sequence[np.ndarray],
    window: int | None,
    stride: int | None,
    batch: int | None,
    progress: Callable[[str, int, int], None] | None,
) -> Perplexity:
    start = time.perf_counter()
    window, stride = _protocol(window, stride, model.inputs.length)
    _check_vocabulary(max((int(one.max()) for one in documents if one.size), default=0), model.vocabulary)
    windows = [one for document in documents for one in _windows(document, window, stride)]
    if not windows:
        raise UserError("the text has fewer than two tokens: there is nothing to score")
    nats = np.empty(len(windows))
    done = 0
    for places in _batches(windows, model.inputs.batch or batch or _batch(window, model.vocabulary)):
        nats[places] = _score(model, [windows[place] for place in places])
        done += len(places)
        if progress is not None:
            progress("perplexity", done, len(windows))
    tokens = sum(len(one.ids) - one.first for one in windows)
    seconds = time.perf_counter() - start
    return Perplexity(math.fsum(nats) / tokens, tokens, len(windows), window, stride, seconds)


def _input(spec: TensorSpec) -> InputSpec:
    return InputSpec(spec.name, spec.dtype, tuple(axis if isinstance(axis, int) else None for axis in spec.shape))


def _logits(outputs: Sequence[TensorSpec]) -> tuple[str, int | None]:
    """Return the name of the output that is scored, and the size of the vocabulary if it is known."""
    one = next((output for output in outputs if output.name == _LOGITS), outputs[0])
    last = one.shape[-1] if one.shape else None
    return one.name, last if isinstance(last, int) else None


def _documents(ids: Any) -> list[np.ndarray]:
    several = isinstance(ids, list | tuple) and any(np.ndim(one) for one in ids)
    documents = [np.asarray(one) for one in (ids if several else [ids])]
    for one in documents:
        if one.ndim != 1 or (one.size and one.dtype.kind not in "iu"):
            raise UserError(f"token numbers must be integers along one axis, not {one.dtype} of {list(one.shape)}")
        if one.size and one.min() < 0:
            raise UserError(f"token numbers must not be negative: there is {one.min()}")
    return [one.astype(np.int64) for one in documents]


def _protocol(window: int | None, stride: int | None, fixed: int | None) -> tuple[int, int]:
    if window is not None and fixed is not None and window > fixed:
        raise UserError(f"the model reads {fixed} tokens at once: a window of {window} does not fit")
    window = window or fixed or WINDOW
    if window < 2:
        raise UserError(f"a window of {window} tokens leaves nothing to predict: it must have at least 2")
    stride = stride if stride is not None else window // 2
    if not 1 <= stride <= window:
        raise UserError(f"the stride must lie between 1 and the window, {window}, not be {stride}")
    return window, stride


def _check_vocabulary(largest: int, vocabulary: int | None) -> None:
    if vocabulary is not None and largest >= vocabulary:
        raise UserError(
            f"the text has token {largest}, but the model only those below {vocabulary}: "
            "the tokenizer belongs to another model"
        )


def _windows(ids: np.ndarray, window: int, stride: int) -> Iterator[_Window]:
    scored = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        first = max(scored, begin + 1)
        if first < end:
            yield _Window(ids[begin:end], first - begin)
        scored = end
        if end == len(ids):
            return


def _batch(window: int, vocabulary: int | None) -> int:
    if vocabulary is None:
        return 1
    return max(1, min(_LARGEST_BATCH, _LOGITS_BYTES // (4 * window * vocabulary)))


def _batches(windows: Sequence[_Window], size: int) -> Iterator[list[int]]:
    """Yield the places of windows that are run together: those of similar length, so that little is filled up."""
    order = sorted(range(len(windows)), key=lambda place: len(windows[place].ids))
    for begin in range(0, len(order), size):
        yield order[begin : begin + size]


def _score(model: _Model, windows: Sequence[_Window]) -> list[float]:
    """Return the negative log-likelihood of each window's scored tokens, in nats."""
    rows = model.inputs.batch or len(windows)
    length = model.inputs.length or max(len(one.ids) for one in windows)
    ids, mask = np.zeros((rows, length), np.int64), np.zeros((rows, length), np.int64)
    # What follows a token cannot change a causal model's answer to it, so windows are filled up on the right.
    for row, one in enumerate(windows):
        ids[row, : len(one.ids)] = one.ids
        mask[row, : len(one.ids)] = 1
    mask[len(windows) :, 0] = 1
    logits = model.run(ids, mask)
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise UserError(f"output '{model.logits}' has shape {list(logits.shape)}, not [batch, length, vocabulary]")
    _check_vocabulary(int(ids.max()), logits.shape[2])
    return [_nats(logits[row], one) for row, one in enumerate(windows)]


def _nats(logits: np.ndarray, window: _Window) -> float:
    predicted = logits[window.first - 1 : len(window.ids) - 1].astype(np.float32, copy=False)
    wanted = window.ids[window.first :, None]
    top = predicted.max(axis=1, keepdims=True)
    normaliser = np.log(np.exp(predicted - top).sum(axis=1, dtype=np.float64)) + top[:, 0]
    result = float((normaliser - np.take_along_axis(predicted, wanted, axis=1)[:, 0]).sum())
    if not math.isfinite(result):
        raise UserError("the model's logits are not finite: it overflows, or its weights hold NaN")
    return result
