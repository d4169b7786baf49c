"""What a config.json says about a decoder, and the refusal of what the graph builder does not know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from qgraph.errors import UserError

__all__ = ["FAMILIES", "DecoderConfig", "read_config"]

FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
_LARGEST = 1 << 20
"""Of any dimension; what is larger is a slip."""
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_FOREIGN = {
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "kv_lora_rank": "latent attention",
    "use_bidirectional_attention": "attention to what follows",
    "quantization_config": "quantized weights; take the checkpoint that is not quantized",
}


@dataclass(frozen=True)
class DecoderConfig:
    """Dimensions and variants of a decoder.

    Attributes:
        family: `model_type`.
        vocabulary: rows of the embedding table.
        hidden: channels between the layers.
        feed_forward: channels inside the gated feed-forward network.
        layers: number of them.
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        head_dim: channels of a head, even.
        epsilon: of the RMS norms.
        frequencies: inverse frequencies of the rotary embedding, scaled if the config says so; head_dim / 2 of them.
        local_frequencies: those of layers with a window.
        activation: "silu", "gelu" or "gelu_tanh".
        tied: whether the embedding table is also the output layer.
        qkv_bias: whether the projections to queries, keys and values add a bias.
        output_bias: whether the projection behind the attention does.
        feed_forward_bias: whether the feed-forward network does.
        head_norms: whether queries and keys are normalised per head (Qwen 3, Gemma 3).
        offset_norms: whether norms multiply by 1 + weight (Gemma).
        sandwich_norms: whether attention and feed-forward are normalised behind as well (Gemma 2 and 3).
        fused: whether q, k and v are stored as one matrix, and gate and up as another (Phi 3).
        embedding_scale: factor of the embeddings.
        attention_scale: factor of the products of queries and keys.
        attention_cap: bound that those are softly held in, or None.
        logits_cap: bound that the logits are softly held in, or None.
        windows: for each layer, how many tokens back it sees, itself included, or None for all.
    """

    family: str
    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    frequencies: tuple[float, ...]
    local_frequencies: tuple[float, ...]
    activation: str
    tied: bool
    qkv_bias: bool
    output_bias: bool
    feed_forward_bias: bool
    head_norms: bool
    offset_norms: bool
    sandwich_norms: bool
    fused: bool
    embedding_scale: float
    attention_scale: float
    attention_cap: float | None
    logits_cap: float | None
    windows: tuple[int | None, ...]


def read_config(path: Path) -> DecoderConfig:
    """Read a config.json.

    Raises:
        UserError: it cannot be read, a field is missing or wrong, or it describes what is not supported.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: name a folder with config.json and .safetensors files") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not a JSON object")
    return _Reader(path, values).config()


class _Reader:
    """Takes fields out of a config.json and checks them."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path = path
        self._values = values

    def config(self) -> DecoderConfig:
        family = self._family()
        gemma = family.startswith("gemma")
        hidden, heads = self._size("hidden_size"), self._size("num_attention_heads")
        layers = self._size("num_hidden_layers")
        kv_heads = self._size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise self._wrong("num_key_value_heads", f"must divide num_attention_heads, {heads}")
        head_dim = self._size("head_dim", 256 if gemma else hidden // heads)
        if head_dim % 2:
            raise self._wrong("head_dim", "must be even")
        attention_bias = self._flag("attention_bias", default=False)
        new_gemma = family in ("gemma2", "gemma3_text")
        scalar = self._number("query_pre_attn_scalar", 256.0) if new_gemma else float(head_dim)
        frequencies, local_frequencies = self._rotary(head_dim, local=family == "gemma3_text")
        return DecoderConfig(
            family=family,
            vocabulary=self._size("vocab_size"),
            hidden=hidden,
            feed_forward=self._size("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            epsilon=self._number("rms_norm_eps", 1e-6),
            frequencies=frequencies,
            local_frequencies=local_frequencies,
            activation=self._activation(gemma=gemma),
            tied=self._flag("tie_word_embeddings", default=gemma),
            qkv_bias=attention_bias or family == "qwen2",
            output_bias=attention_bias and family != "qwen2",
            feed_forward_bias=self._flag("mlp_bias", default=False) and family == "llama",
            head_norms=family in ("qwen3", "gemma3_text"),
            offset_norms=gemma,
            sandwich_norms=new_gemma,
            fused=family == "phi3",
            embedding_scale=float(hidden) ** 0.5 if gemma else 1.0,
            attention_scale=scalar**-0.5,
            attention_cap=self._cap("attn_logit_softcapping", 50.0 if family == "gemma2" else None),
            logits_cap=self._cap("final_logit_softcapping", 30.0 if family == "gemma2" else None),
            windows=self._windows(family, layers),
        )

    def _family(self) -> str:
        family = self._values.get("model_type")
        if family not in FAMILIES:
            raise self._wrong("model_type", f"only {', '.join(FAMILIES)} are supported")
        for field, meaning in _FOREIGN.items():
            if self._values.get(field):
                raise UserError(f"{self._path}: {field} is set: {meaning} is not supported")
        if self._values.get("partial_rotary_factor") not in (None, 1):
            raise self._wrong("partial_rotary_factor", "only rotary embedding of whole heads is supported")
        return str(family)

    def _activation(self, *, gemma: bool) -> str:
        # Early Gemma configs say "gelu" in hidden_act and mean the approximation by tanh.
        field, default = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
        name = self._values.get(field) or default
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise self._wrong(field, f"only {', '.join(_ACTIVATIONS)} are supported")
        return _ACTIVATIONS[name]

    def _windows(self, family: str, layers: int) -> tuple[int | None, ...]:
        window = self._values.get("sliding_window")
        if family in ("gemma2", "gemma3_text", "mistral") and "sliding_window" not in self._values:
            window = 4096  # the default of all three in transformers
        if window is None or family in ("llama", "gemma"):
            return (None,) * layers
        if family.startswith("qwen") and not self._flag("use_sliding_window", default=False):
            return (None,) * layers
        if type(window) is not int or window < 1:
            raise self._wrong("sliding_window", "must be a positive number")
        kinds = self._values.get("layer_types")
        if kinds is None:
            first = self._values.get("max_window_layers", 28) if family.startswith("qwen") else 0
            if type(first) is not int:
                raise self._wrong("max_window_layers", "must be a whole number")
            kinds = ["sliding_attention" if index >= first else "full_attention" for index in range(layers)]
            if family in ("gemma2", "gemma3_text"):
                every = 2 if family == "gemma2" else self._size("sliding_window_pattern", 6)
                kinds = ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(layers)]
        known = isinstance(kinds, list) and all(kind in ("full_attention", "sliding_attention") for kind in kinds)
        if not known or len(kinds) != layers:
            raise self._wrong("layer_types", f"must hold full_attention or sliding_attention for {layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def _rotary(self, head_dim: int, *, local: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the inverse frequencies of layers that see everything, and of those with a window."""
        scaling = self._values.get("rope_parameters") or self._values.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise self._wrong("rope_scaling", "must be an object")
        whole, near = scaling.get("full_attention", scaling), scaling.get("sliding_attention", scaling)
        if local and near is scaling:
            near = {"rope_theta": self._values.get("rope_local_base_freq", 10000.0)}
        default = 1e6 if local else 1e4
        return self._frequencies(head_dim, whole, default), self._frequencies(head_dim, near, default)

    def _frequencies(self, head_dim: int, scaling: Mapping[str, Any], default: float) -> tuple[float, ...]:
        """Return the inverse frequencies of the rotary embedding (Su et al., 2021), head_dim / 2 of them."""
        if not isinstance(scaling, dict):
            raise self._wrong("rope_parameters", "must hold objects")
        theta = scaling.get("rope_theta", self._values.get("rope_theta", default))
        if not _is_positive(theta):
            raise self._wrong("rope_theta", "must be a positive number")
        frequencies = float(theta) ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "linear":
            frequencies /= self._scaling(scaling, "factor")
        elif kind == "llama3":
            frequencies = self._llama3(frequencies, scaling)
        if kind in ("default", "linear", "llama3"):
            return tuple(frequencies.tolist())
        raise UserError(f"{self._path}: rope_scaling of type {kind!r} is not supported, only default, linear, llama3")

    def _llama3(self, frequencies: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
        """Slow the long waves down by `factor`, leave the short ones, and go smoothly in between (Llama 3.1)."""
        factor, low = self._scaling(scaling, "factor"), self._scaling(scaling, "low_freq_factor")
        high = self._scaling(scaling, "high_freq_factor")
        context = self._scaling(scaling, "original_max_position_embeddings")
        if high <= low:
            raise UserError(f"{self._path}: rope_scaling.high_freq_factor must be above low_freq_factor, {low}")
        turns = context * frequencies / (2 * np.pi)
        share: np.ndarray = np.clip((turns - low) / (high - low), 0, 1)
        slowed: np.ndarray = (1 - share) * frequencies / factor + share * frequencies
        return slowed

    def _scaling(self, scaling: Mapping[str, Any], field: str) -> float:
        value = scaling.get(field)
        if not _is_positive(value):
            raise UserError(f"{self._path}: rope_scaling.{field} is {value!r}: it must be a positive number")
        return float(value)

    def _size(self, field: str, default: int | None = None) -> int:
        value = self._values.get(field)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise self._wrong(field, f"must be a positive whole number, {_LARGEST} at most")
        return value

    def _number(self, field: str, default: float) -> float:
        value = self._values.get(field, default)
        if not _is_positive(value):
            raise self._wrong(field, "must be a positive number")
        return float(value)

    def _cap(self, field: str, default: float | None) -> float | None:
        return None if self._values.get(field, default) is None else self._number(field, default or 0.0)

    def _flag(self, field: str, *, default: bool) -> bool:
        value = self._values.get(field, default)
        if not isinstance(value, bool):
            raise self._wrong(field, "must be true or false")
        return value

    def _wrong(self, field: str, why: str) -> UserError:
        return UserError(f"{self._path}: {field} is {self._values.get(field)!r}: {why}")


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
