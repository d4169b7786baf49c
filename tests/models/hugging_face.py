"""Folders as the transformers library writes them, and what their decoders compute, slowly, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

CODES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}
CODES |= {np.dtype(np.int64): "I64", np.dtype(np.float64): "F64"}
DEFAULTS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a file as the format's description says."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def folder(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """Write config.json and the weights, in one file or several with an index."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        safetensors(path / "model.safetensors", tensors)
        return path
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        safetensors(path / file, part)
        index |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def random_weights(config: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """Return weights of all the names that a decoder of this config has."""
    random = np.random.default_rng(seed)
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    family = config["model_type"]
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = (random.normal(size=(rows, columns)) * 1.5 / math.sqrt(columns)).astype(dtype)

    def vector(name: str, length: int) -> None:
        centre = 0.0 if family.startswith("gemma") or name.endswith("bias") else 1.0
        tensors[name] = (centre + 0.3 * random.normal(size=length)).astype(dtype)

    matrix("model.embed_tokens", config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        for name, rows, columns in (
            ("self_attn.q_proj", heads, hidden),
            ("self_attn.k_proj", kv_heads, hidden),
            ("self_attn.v_proj", kv_heads, hidden),
            ("self_attn.o_proj", hidden, heads),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            matrix(f"{layer}.{name}", rows, columns)
            qkv = name[10] in "qkv" and name.startswith("self_attn")
            attention = name.startswith("self_attn") and config.get("attention_bias")
            if attention or (family == "qwen2" and qkv) or (name.startswith("mlp") and config.get("mlp_bias")):
                vector(f"{layer}.{name}.bias", rows)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if family in ("gemma2", "gemma3_text"):
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for norm in norms:
            vector(f"{layer}.{norm}.weight", hidden)
        if family in ("qwen3", "gemma3_text"):
            vector(f"{layer}.self_attn.q_norm.weight", size)
            vector(f"{layer}.self_attn.k_norm.weight", size)
    vector("model.norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", config["vocab_size"], hidden)
    return tensors


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights as Phi 3 stores them: q over k over v, and gate over up."""
    result = dict(tensors)
    for name in tensors:
        if name.endswith("q_proj.weight"):
            layer = name.removesuffix("self_attn.q_proj.weight")
            parts = [result.pop(f"{layer}self_attn.{part}_proj.weight") for part in "qkv"]
            result[f"{layer}self_attn.qkv_proj.weight"] = np.concatenate(parts)
            parts = [result.pop(f"{layer}mlp.{part}_proj.weight") for part in ("gate", "up")]
            result[f"{layer}mlp.gate_up_proj.weight"] = np.concatenate(parts)
    return result


def forward(config: dict[str, Any], tensors: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Return the logits [seq, vocabulary] of one sequence, head by head and token by token."""
    w = {name: array.astype(np.float64) for name, array in tensors.items()}
    family, heads, size = config["model_type"], config["num_attention_heads"], config["head_dim"]
    group = heads // config["num_key_value_heads"]
    gemma, sandwich = family.startswith("gemma"), family in ("gemma2", "gemma3_text")

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        gain = w[f"{name}.weight"] + 1 if gemma else w[f"{name}.weight"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * gain

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def capped(x: np.ndarray, bound: float | None) -> np.ndarray:
        return x if bound is None else bound * np.tanh(x / bound)

    x = w["model.embed_tokens.weight"][ids] * (math.sqrt(config["hidden_size"]) if gemma else 1)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        y = norm(f"{layer}.input_layernorm", x)
        mixed = np.zeros((len(ids), heads * size))
        for head in range(heads):
            own, shared = slice(head * size, (head + 1) * size), head // group
            other = slice(shared * size, (shared + 1) * size)
            q = linear(f"{layer}.self_attn.q_proj", y)[:, own]
            k = linear(f"{layer}.self_attn.k_proj", y)[:, other]
            v = linear(f"{layer}.self_attn.v_proj", y)[:, other]
            if family in ("qwen3", "gemma3_text"):
                q, k = norm(f"{layer}.self_attn.q_norm", q), norm(f"{layer}.self_attn.k_norm", k)
            q, k = rotated(config, q, index), rotated(config, k, index)
            for row in range(len(ids)):
                first = max(0, row + 1 - reach(config, index))
                scale = config.get("query_pre_attn_scalar", size) ** -0.5
                scores = capped(k[first : row + 1] @ q[row] * scale, config.get("attn_logit_softcapping"))
                shares = np.exp(scores - scores.max())
                mixed[row, own] = shares / shares.sum() @ v[first : row + 1]
        y = linear(f"{layer}.self_attn.o_proj", mixed)
        x = x + (norm(f"{layer}.post_attention_layernorm", y) if sandwich else y)
        before = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        y = norm(f"{layer}.{before}", x)
        y = activated(config, linear(f"{layer}.mlp.gate_proj", y)) * linear(f"{layer}.mlp.up_proj", y)
        y = linear(f"{layer}.mlp.down_proj", y)
        x = x + (norm(f"{layer}.post_feedforward_layernorm", y) if sandwich else y)
    head = w["model.embed_tokens.weight"] if config["tie_word_embeddings"] else w["lm_head.weight"]
    return capped(norm("model.norm", x) @ head.T, config.get("final_logit_softcapping"))


def reach(config: dict[str, Any], layer: int) -> int:
    """Return how many tokens a layer sees."""
    window = config.get("sliding_window")
    family = config["model_type"]
    if family == "gemma3_text":
        return window if (layer + 1) % config["sliding_window_pattern"] else 10**9
    if window is None or (family == "gemma2" and layer % 2) or (family == "qwen2" and not config["use_sliding_window"]):
        return 10**9
    return 10**9 if family == "qwen2" and layer < config["max_window_layers"] else window


def rotated(config: dict[str, Any], x: np.ndarray, layer: int) -> np.ndarray:
    """Turn pair (i, i + half) of row p by p times its frequency."""
    half = x.shape[1] // 2
    scaling, theta = config.get("rope_scaling") or {"rope_type": "default"}, config["rope_theta"]
    if config["model_type"] == "gemma3_text" and (layer + 1) % config["sliding_window_pattern"]:
        scaling, theta = {"rope_type": "default"}, config["rope_local_base_freq"]
    result = x.copy()
    for i in range(half):
        frequency = theta ** (-i / half)
        if scaling["rope_type"] == "linear":
            frequency /= scaling["factor"]
        if scaling["rope_type"] == "llama3":
            old, low, high = (
                scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
            )
            length = 2 * math.pi / frequency
            smooth = (old / length - low) / (high - low)
            if length > old / low:
                frequency /= scaling["factor"]
            elif length >= old / high:
                frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
        for position in range(len(x)):
            cosine, sine = math.cos(position * frequency), math.sin(position * frequency)
            a, b = x[position, i], x[position, i + half]
            result[position, i], result[position, i + half] = a * cosine - b * sine, b * cosine + a * sine
    return result


def activated(config: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """Apply the activation of the gate."""
    name = config.get("hidden_activation") or config["hidden_act"]
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
