"""Decoders of the Llama kind as ONNX graphs, from a Hugging Face style folder, without torch.

::

    input_ids [batch, seq], attention_mask [batch, past + seq], past_key_values.i.key, .value [batch, kv_heads, past, d]
      embedding (Gemma: times sqrt(hidden))
      layers     x + attention(RMSNorm(x))    rotary embedding, grouped queries; Qwen 3, Gemma 3: norms of heads
                 x + gated feed-forward(RMSNorm(x))
      RMSNorm, output layer (its own, or the embedding)
    logits [batch, seq, vocabulary], present.i.key, .value [batch, kv_heads, past + seq, d]

One graph reads a prompt (with an empty past) and continues it. Positions follow from attention_mask, so that prompts
of unequal length may be filled up on the left. Everything is decomposed into operators of opset 21. Keys and values
are never repeated for the query heads that share them: those are laid side by side instead,

    q [b, heads, s, d] -> [b, kv_heads, heads / kv_heads * s, d]

which is the same product over fewer, larger matrices. Weights of linear layers stand as [K, N] in MatMul; the
embedding, if it is the output layer too, reads through a Transpose. All weights are read from the mapped checkpoint
when the graph is written.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.errors import UserError
from qgraph.models.decoder_config import DecoderConfig, read_config
from qgraph.models.decoder_weights import CheckpointTensor
from qgraph.models.graph import GraphWriter
from qgraph.onnx_file import MappedTensor
from qgraph.safetensors import open_safetensors

__all__ = ["Exported", "build", "export"]

OPSET = 21
IR_VERSION = 10
DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}

_INT64_MAX = 2**63 - 1
_BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "attn.masked_bias")
_GRAPH_BYTES = 16 << 20
"""More than a graph takes without its weights."""

Dtype = Literal["float32", "float16"]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: of the graph.
        files: the graph and, above a size, the file with its weights.
        bytes: of all files.
        parameters: number of weights, tied ones counted once.
        family: `model_type` of the checkpoint.
        dtype: of weights and activations.
        cache: whether the graph takes and gives keys and values.
    """

    path: Path
    files: tuple[Path, ...]
    bytes: int
    parameters: int
    family: str
    dtype: str
    cache: bool

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        values = dataclasses.asdict(self)
        return {**values, "path": str(self.path), "files": [str(file) for file in self.files]}


def export(
    folder: str | Path,
    output: str | Path,
    *,
    dtype: Dtype = "float32",
    cache: bool = True,
    force: bool = False,
    external_above: int = qgraph.ir.EXTERNAL_ABOVE,
    progress: Progress | None = None,
) -> Exported:
    """Write the decoder in `folder` as an ONNX model.

    Args:
        folder: config.json and .safetensors files.
        output: the model's file.
        dtype: of weights, activations and cache; norms and softmax compute in float32.
        cache: take and give keys and values, to continue a text token by token.
        force: replace a model that stands at `output`.
        external_above: bytes of weights above which these go to a file beside the graph.
        progress: called with "export", megabytes written and in all.

    Raises:
        UserError: as `build`; or `output` exists, or cannot be written, or the disk has too little room.
    """
    output = Path(output)
    if output.exists() and not force:
        raise UserError(f"{output} exists. Pass --force to replace it, or another file with -o.")
    counter = _Counter(progress)
    weights = _open(Path(folder), dtype, counter.add)
    model = _build(weights, cache=cache)
    counter.total = qgraph.ir.weight_bytes(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    _require_room(output, counter.total + _GRAPH_BYTES)
    qgraph.ir.save(model, output, external_above=external_above)
    files = (output, *(output.with_name(file.name) for file in qgraph.ir.data_files(qgraph.ir.load(output))))
    written = sum(file.stat().st_size for file in files)
    return Exported(output, files, written, weights.count, weights.config.family, dtype, cache)


def build(folder: str | Path, *, dtype: Dtype = "float32", cache: bool = True) -> ir.Model:
    """Return the decoder in `folder` as a graph whose weights are still in the checkpoint.

    Raises:
        UserError: config.json or the weights cannot be read or are damaged; the architecture is not supported, in
            which case the field is named; or a weight is missing, has the wrong shape or type, or has no use.
    """
    return _build(_open(Path(folder), dtype, _ignore), cache=cache)


def _ignore(count: int) -> None:
    del count


class _Counter:
    """Counts what has been written, in megabytes for people."""

    def __init__(self, progress: Progress | None) -> None:
        self.total = 0
        self._progress = progress
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress("export", self._done // 10**6, self.total // 10**6)


def _require_room(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise UserError(
            f"{output} needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB left: "
            "make room, or choose another disk with -o"
        )


def _open(folder: Path, dtype: Dtype, written: Callable[[int], None]) -> _Weights:
    if dtype not in DTYPES:
        raise UserError(f"the type of the weights must be {' or '.join(DTYPES)}, not '{dtype}'")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name the one that holds config.json and the .safetensors files")
    return _Weights(folder, read_config(folder / "config.json"), DTYPES[dtype], written)


def _build(weights: _Weights, *, cache: bool) -> ir.Model:
    model = _DecoderWriter(weights, cache=cache).write()
    weights.refuse_unused()
    return model


class _Weights:
    """The checkpoint's tensors by their name in the transformers library, each checked when it is taken."""

    def __init__(self, folder: Path, config: DecoderConfig, dtype: ir.DataType, written: Callable[[int], None]) -> None:
        self.config = config
        self.dtype = dtype
        self._folder = folder
        self._tensors = open_safetensors(folder)
        self._written = written
        self._taken: dict[str, int] = {}
        # A checkpoint of the decoder without its output layer has no prefix.
        self.prefix = "" if "embed_tokens.weight" in self._tensors else "model."

    @property
    def count(self) -> int:
        """The number of parameters that were taken."""
        return sum(self._taken.values())

    def take(self, name: str, *shape: int, transpose: bool = False) -> CheckpointTensor:
        """Return a weight, which is stored as `shape`, or as rows of a larger one."""
        fused, begin, rows = self._place(name, shape[0])
        stored = self._stored(fused, (rows, *shape[1:]))
        if fused != name:
            stored = self._tensors.rows(fused, begin, begin + shape[0])
            stored.name = name
        return CheckpointTensor(stored, self.dtype, transpose=transpose, written=self._written)

    def read(self, name: str, *shape: int) -> np.ndarray:
        """Return a small weight as float32."""
        return self._stored(name, shape).numpy().astype(np.float32)

    def _place(self, name: str, rows: int) -> tuple[str, int, int]:
        """Return in which stored weight another lies, from which row on, and how many rows that has."""
        config = self.config
        queries, others = config.heads * config.head_dim, config.kv_heads * config.head_dim
        parts = {
            "self_attn.q_proj.weight": ("self_attn.qkv_proj.weight", 0, queries + 2 * others),
            "self_attn.k_proj.weight": ("self_attn.qkv_proj.weight", queries, queries + 2 * others),
            "self_attn.v_proj.weight": ("self_attn.qkv_proj.weight", queries + others, queries + 2 * others),
            "mlp.gate_proj.weight": ("mlp.gate_up_proj.weight", 0, 2 * config.feed_forward),
            "mlp.up_proj.weight": ("mlp.gate_up_proj.weight", config.feed_forward, 2 * config.feed_forward),
        }
        for part, (whole, begin, total) in parts.items():
            if config.fused and name.endswith(part):
                return name.removesuffix(part) + whole, begin, total
        return name, 0, rows

    def _stored(self, name: str, shape: Sequence[int]) -> MappedTensor:
        stored = self._tensors[name]
        self._taken[name] = stored.size
        if tuple(stored.shape.numpy()) != tuple(shape):
            found = list(stored.shape.numpy())
            raise UserError(f"{stored.path}: tensor '{name}' is {found}, but config.json makes it {list(shape)}")
        return stored

    def refuse_unused(self) -> None:
        """Refuse a checkpoint with weights that the graph does not have: it would compute something else."""
        for name in self._tensors:
            if name in self._taken or name.endswith(_BUFFERS) or (self.config.tied and name == "lm_head.weight"):
                continue
            raise UserError(
                f"{self._folder} has the tensor '{name}', which a decoder of this config.json does not: "
                "model_type or another field does not fit the weights"
            )


class _DecoderWriter(GraphWriter):
    """Writes the graph of one decoder."""

    def __init__(self, weights: _Weights, *, cache: bool) -> None:
        super().__init__(weights.config.family, {})
        self.config = weights.config
        self._weights = weights
        self._half = weights.dtype == ir.DataType.FLOAT16
        self._cache = cache
        self._outputs: list[ir.Value] = []

    def write(self) -> ir.Model:
        """Return the whole graph."""
        config = self.config
        ids = self.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
        total = "past_sequence_length + sequence_length" if self._cache else "sequence_length"
        mask = self.input("attention_mask", ir.DataType.INT64, ["batch_size", total])
        past = [self._past(index) for index in range(config.layers)] if self._cache else []
        x, table = self._embed(ids)
        lengths = self._lengths(ids, mask)
        rotary = self._rotary(self._positions(mask, lengths))
        biases = {window: self._attention_bias(mask, lengths, window) for window in dict.fromkeys(config.windows)}
        for index, window in enumerate(config.windows):
            with self.scope(f"{self._weights.prefix}layers.{index}"):
                attention = _Attention(self, past[index] if past else None, rotary[window], biases[window])
                x = self._residual(x, "input_layernorm", attention.write, "post_attention_layernorm")
                inner = "pre_feedforward_layernorm" if config.sandwich_norms else "post_attention_layernorm"
                x = self._residual(x, inner, self._feed_forward, "post_feedforward_layernorm")
            self._present(index, attention)
        x = self.norm(f"{self._weights.prefix}norm", x, config.hidden)
        logits = self._logits(x, table)
        self._name_output(logits, "logits", ["batch_size", "sequence_length", config.vocabulary])
        graph = ir.Graph(
            self._inputs,
            [logits, *self._outputs],
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET},
            name=config.family,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="qgraph")

    # --- pieces that the attention uses as well

    def number(self, value: float) -> ir.Value:
        """Return a scalar initializer in the type of the activations."""
        if not self._half:
            return self.scalar(value)
        return self.constant(f"float16_{value:.9g}", np.array(value, dtype=np.float16))

    def widen(self, x: ir.Value) -> ir.Value:
        """Return `x` in float32."""
        return self.op("Cast", x, attributes={"to": ir.DataType.FLOAT.value}) if self._half else x

    def narrow(self, x: ir.Value) -> ir.Value:
        """Return a float32 `x` in the type of the activations."""
        return self.op("Cast", x, attributes={"to": ir.DataType.FLOAT16.value}) if self._half else x

    def norm(self, name: str, x: ir.Value, channels: int) -> ir.Value:
        """Write x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in float32 (Zhang & Sennrich, 2019)."""
        with self.scope(name):
            weight = self._weights.read(".".join((*self._scope, "weight")), channels)
            gain = self.constant(".".join((*self._scope, "weight")), weight + np.float32(self.config.offset_norms))
            x = self.widen(x)
            mean = self.op("ReduceMean", self.op("Pow", x, self.scalar(2.0)), self.integers(-1))
            root = self.op("Sqrt", self.op("Add", mean, self.scalar(self.config.epsilon)))
            return self.narrow(self.op("Mul", self.op("Div", x, root), gain))

    def project(self, name: str, x: ir.Value, inputs: int, outputs: int, *, bias: bool) -> ir.Value:
        """Write a linear layer: MatMul with the weight as [inputs, outputs], then Add."""
        with self.scope(name):
            y = self.op("MatMul", x, self._weight("weight", outputs, inputs, transpose=True))
            return self.op("Add", y, self._weight("bias", outputs)) if bias else y

    def cap(self, x: ir.Value, bound: float | None) -> ir.Value:
        """Hold a float32 `x` between -bound and bound: bound * tanh(x / bound)."""
        if bound is None:
            return x
        return self.op("Mul", self.op("Tanh", self.op("Div", x, self.scalar(bound))), self.scalar(bound))

    def _weight(self, name: str, *shape: int, transpose: bool = False) -> ir.Value:
        key = ".".join((*self._scope, name))
        if key not in self._initializers:
            tensor = self._weights.take(key, *shape, transpose=transpose)
            self._initializers[key] = self._tape.initializer(tensor, name=key)
        return self._initializers[key]

    # --- the graph from its inputs to its outputs

    def _past(self, index: int) -> tuple[ir.Value, ir.Value]:
        config = self.config
        shape: list[int | str] = ["batch_size", config.kv_heads, "past_sequence_length", config.head_dim]
        key, value = (
            self.input(f"past_key_values.{index}.{kind}", self._weights.dtype, shape) for kind in ("key", "value")
        )
        return key, value

    def _present(self, index: int, attention: _Attention) -> None:
        if not self._cache:
            return
        config = self.config
        total = "past_sequence_length + sequence_length"
        for kind, value in (("key", attention.key), ("value", attention.value)):
            assert value is not None
            self._name_output(value, f"present.{index}.{kind}", ["batch_size", config.kv_heads, total, config.head_dim])
            self._outputs.append(value)

    def _name_output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        value.name, value.dtype, value.shape = name, self._weights.dtype, ir.Shape(shape)

    def _embed(self, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
        with self.scope(f"{self._weights.prefix}embed_tokens"):
            table = self._weight("weight", self.config.vocabulary, self.config.hidden)
            x = self.op("Gather", table, ids)
            if self.config.embedding_scale != 1.0:
                x = self.op("Mul", x, self.number(self.config.embedding_scale))
            return x, table

    def _logits(self, x: ir.Value, table: ir.Value) -> ir.Value:
        config = self.config
        if config.tied:
            with self.scope("lm_head"):
                logits = self.op("MatMul", x, self.op("Transpose", table, attributes={"perm": [1, 0]}))
        else:
            logits = self.project("lm_head", x, config.hidden, config.vocabulary, bias=False)
        with self.scope("logits"):
            return logits if config.logits_cap is None else self.narrow(self.cap(self.widen(logits), config.logits_cap))

    def _lengths(self, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Write how many tokens the cache holds, and how many there are with the new ones: int64 scalars."""
        total = self.op("Gather", self.op("Shape", mask), self.integer(1))
        new = self.op("Gather", self.op("Shape", ids), self.integer(1))
        return self.op("Sub", total, new), total

    def _positions(self, mask: ir.Value, lengths: tuple[ir.Value, ir.Value]) -> ir.Value:
        """Write how many tokens stand before each of the new ones, filling not counted: float32 [batch, 1, seq, 1]."""
        with self.scope("positions"):
            counted = self.op("Sub", self.op("CumSum", mask, self.integer(1)), self.integer(1))
            begin = self.op("Unsqueeze", lengths[0], self.integers(0))
            new = self.op("Slice", counted, begin, self.integers(_INT64_MAX), self.integers(1))
            column = self.op("Unsqueeze", self.op("Max", new, self.integer(0)), self.integers(1, 3))
            return self.op("Cast", column, attributes={"to": ir.DataType.FLOAT.value})

    def _rotary(self, positions: ir.Value) -> dict[int | None, tuple[ir.Value, ir.Value]]:
        """Write the rotation of layers with each window."""
        config = self.config
        whole = self._rotary_tables(positions, "rotary_emb", config.frequencies)
        near = whole
        if config.local_frequencies != config.frequencies:
            near = self._rotary_tables(positions, "rotary_emb_local", config.local_frequencies)
        return {window: whole if window is None else near for window in config.windows}

    def _rotary_tables(self, positions: ir.Value, name: str, frequencies: Sequence[float]) -> tuple[ir.Value, ir.Value]:
        """Write cosines and sines of the rotation, each [batch, 1, seq, head_dim]."""
        with self.scope(f"{self._weights.prefix}{name}"):
            table = self.constant(f"{name}.inv_freq", np.array(frequencies, dtype=np.float32))
            angles = self.op("Mul", positions, table)
            angles = self.op("Concat", angles, angles, attributes={"axis": -1})
            return self.narrow(self.op("Cos", angles)), self.narrow(self.op("Sin", angles))

    def _attention_bias(self, mask: ir.Value, lengths: tuple[ir.Value, ir.Value], window: int | None) -> ir.Value:
        """Write float32 [batch, 1, seq, past + seq]: 0 where a token may look, the lowest float elsewhere."""
        past, total = lengths
        with self.scope("causal_mask" if window is None else "sliding_mask"):
            rows = self.op("Unsqueeze", self.op("Range", past, total, self.integer(1)), self.integers(1))
            columns = self.op("Range", self.integer(0), total, self.integer(1))
            visible = self.op("LessOrEqual", columns, rows)
            if window is not None:
                near = self.op("Greater", columns, self.op("Sub", rows, self.integer(window)))
                visible = self.op("And", visible, near)
            tokens = self.op("Cast", mask, attributes={"to": ir.DataType.BOOL.value})
            visible = self.op("And", self.op("Unsqueeze", tokens, self.integers(1, 2)), visible)
            return self.op("Where", visible, self.scalar(0.0), self.scalar(float(np.finfo(np.float32).min)))

    def _residual(self, x: ir.Value, before: str, part: Callable[[ir.Value], ir.Value], behind: str) -> ir.Value:
        y = part(self.norm(before, x, self.config.hidden))
        if self.config.sandwich_norms:
            y = self.norm(behind, y, self.config.hidden)
        return self.op("Add", x, y)

    def _feed_forward(self, x: ir.Value) -> ir.Value:
        config, bias = self.config, self.config.feed_forward_bias
        with self.scope("mlp"):
            gate = self._activate(self.project("gate_proj", x, config.hidden, config.feed_forward, bias=bias))
            up = self.project("up_proj", x, config.hidden, config.feed_forward, bias=bias)
            return self.project("down_proj", self.op("Mul", gate, up), config.feed_forward, config.hidden, bias=bias)

    def _activate(self, x: ir.Value) -> ir.Value:
        with self.scope("act_fn"):
            if self.config.activation == "silu":
                return self.op("Mul", x, self.op("Sigmoid", x))
            approximate = "tanh" if self.config.activation == "gelu_tanh" else "none"
            return self.op("Gelu", x, attributes={"approximate": approximate})


class _Attention:
    """Self-attention of one layer (Vaswani et al., 2017; grouped queries: Ainslie et al., 2023).

    Attributes:
        key: all keys, rotated, with those of the cache: [batch, kv_heads, past + seq, head_dim]; set by `write`.
        value: all values, likewise.
    """

    def __init__(
        self,
        writer: _DecoderWriter,
        past: tuple[ir.Value, ir.Value] | None,
        rotary: tuple[ir.Value, ir.Value],
        bias: ir.Value,
    ) -> None:
        self.key: ir.Value | None = None
        self.value: ir.Value | None = None
        self._writer = writer
        self._config = writer.config
        self._past = past
        self._rotary = rotary
        self._bias = bias

    def write(self, x: ir.Value) -> ir.Value:
        """Write the attention of `x` [batch, seq, hidden] and return as much."""
        writer, config = self._writer, self._config
        with writer.scope("self_attn"):
            q = self._rotate(self._heads("q", x, config.heads))
            self.key = k = self._extend(self._rotate(self._heads("k", x, config.kv_heads)), 0)
            self.value = v = self._extend(self._heads("v", x, config.kv_heads), 1)
            scores = self._spread(writer.op("MatMul", self._gather(q), self._transposed(k)))
            scores = writer.op("Mul", writer.widen(scores), writer.scalar(config.attention_scale))
            biased = writer.op("Add", writer.cap(scores, config.attention_cap), self._bias)
            shares = writer.narrow(writer.op("Softmax", biased, attributes={"axis": -1}))
            mixed = self._spread(writer.op("MatMul", self._gather(shares), v))
            merged = writer.op("Transpose", mixed, attributes={"perm": [0, 2, 1, 3]})
            width = config.heads * config.head_dim
            merged = writer.op("Reshape", merged, writer.integers(0, 0, width))
            return writer.project("o_proj", merged, width, config.hidden, bias=config.output_bias)

    def _heads(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        """Project [b, s, hidden] to [b, heads, s, head_dim]."""
        writer, config = self._writer, self._config
        y = writer.project(f"{name}_proj", x, config.hidden, heads * config.head_dim, bias=config.qkv_bias)
        y = writer.op("Reshape", y, writer.integers(0, 0, heads, config.head_dim))
        if config.head_norms and name != "v":
            y = writer.norm(f"{name}_norm", y, config.head_dim)
        return writer.op("Transpose", y, attributes={"perm": [0, 2, 1, 3]})

    def _rotate(self, x: ir.Value) -> ir.Value:
        """Write the rotary embedding over halves of the heads."""
        writer, (cosine, sine) = self._writer, self._rotary
        half = self._config.head_dim // 2
        low = writer.op("Slice", x, writer.integers(0), writer.integers(half), writer.integers(-1))
        high = writer.op("Slice", x, writer.integers(half), writer.integers(_INT64_MAX), writer.integers(-1))
        turned = writer.op("Concat", writer.op("Neg", high), low, attributes={"axis": -1})
        return writer.op("Add", writer.op("Mul", x, cosine), writer.op("Mul", turned, sine))

    def _extend(self, new: ir.Value, which: int) -> ir.Value:
        if self._past is None:
            return new
        return self._writer.op("Concat", self._past[which], new, attributes={"axis": 2})

    def _transposed(self, k: ir.Value) -> ir.Value:
        return self._writer.op("Transpose", k, attributes={"perm": [0, 1, 3, 2]})

    def _gather(self, x: ir.Value) -> ir.Value:
        """Lay the heads that share keys and values below one another: [b, heads, s, n] to [b, kv_heads, ., n]."""
        return self._reshaped(x, self._config.kv_heads)

    def _spread(self, x: ir.Value) -> ir.Value:
        """Undo `_gather`."""
        return self._reshaped(x, self._config.heads)

    def _reshaped(self, x: ir.Value, heads: int) -> ir.Value:
        if self._config.heads == self._config.kv_heads:
            return x
        # The number of rows is found, all else is copied or known: the number of sequences may be anything but 0.
        return self._writer.op("Reshape", x, self._writer.integers(0, heads, -1, 0))
