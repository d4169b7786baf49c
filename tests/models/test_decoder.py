"""Exported decoders against an independent forward pass, with and without a cache."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

import qgraph
from qgraph.errors import UserError
from qgraph.models import decoder
from qgraph.models.decoder_config import read_config

sys.path.insert(0, str(Path(__file__).parent))

from hugging_face import DEFAULTS, folder, forward, fused, random_weights

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama 3.1": {"model_type": "llama", "rope_scaling": LLAMA3, "rope_theta": 500.0, "tie_word_embeddings": True},
    "llama with biases": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 4,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5, "num_key_value_heads": 1},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
        "hidden_act": "gelu",
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "sliding_window": None, "use_sliding_window": False},
    "gemma": {"model_type": "gemma", "tie_word_embeddings": True, "hidden_activation": None, "hidden_act": "gelu_new"},
    "gemma2": {
        "model_type": "gemma2",
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 5,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "rope_theta": 1000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "phi3": {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6},
}
LENGTH = 13


def config_of(family: str) -> dict[str, Any]:
    return {**DEFAULTS, **FAMILIES[family]}


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options)


def empty_cache(run: onnxruntime.InferenceSession, batch: int) -> dict[str, np.ndarray]:
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {
        one.name: np.zeros((batch, one.shape[1], 0, one.shape[3]), kinds[one.type])
        for one in run.get_inputs()
        if one.name.startswith("past_key_values.")
    }


def ids_of(batch: int, vocabulary: int = 64) -> np.ndarray:
    return np.random.default_rng(5).integers(0, vocabulary, (batch, LENGTH))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_an_independent_forward_pass(tmp_path: Path, family: str):
    config = config_of(family)
    weights = random_weights(config)
    folder(tmp_path / "hf", config, fused(weights) if family == "phi3" else weights)
    decoder.export(tmp_path / "hf", tmp_path / "model.onnx")
    run, ids = session(tmp_path / "model.onnx"), ids_of(2)
    wanted = np.stack([forward(config, weights, row) for row in ids])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (logits,) = run.run(["logits"], feeds | empty_cache(run, 2))
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_gives_what_the_whole_gives(tmp_path: Path, family: str):
    config = config_of(family)
    weights = random_weights(config)
    folder(tmp_path / "hf", config, fused(weights) if family == "phi3" else weights)
    decoder.export(tmp_path / "hf", tmp_path / "model.onnx")
    decoder.export(tmp_path / "hf", tmp_path / "plain.onnx", cache=False)
    ids = ids_of(2)
    plain = session(tmp_path / "plain.onnx")
    assert [one.name for one in plain.get_inputs()] == ["input_ids", "attention_mask"]
    (wanted,) = plain.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    run = session(tmp_path / "model.onnx")
    cache, pieces, seen = empty_cache(run, 2), [], 0
    for step in (4, 1, 1, 3, 1, 3):
        mask = np.ones((2, seen + step), np.int64)
        logits, *present = run.run(None, {"input_ids": ids[:, seen : seen + step], "attention_mask": mask, **cache})
        cache = dict(zip(cache, present, strict=True))
        pieces.append(logits)
        seen += step
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), wanted, rtol=0, atol=2e-5)


def test_prompts_filled_up_on_the_left_are_as_if_alone(tmp_path: Path):
    config = config_of("mistral")
    folder(tmp_path / "hf", config, random_weights(config))
    decoder.export(tmp_path / "hf", tmp_path / "model.onnx")
    run, ids = session(tmp_path / "model.onnx"), ids_of(1)
    (alone,) = run.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_cache(run, 1)})
    padded = np.concatenate([np.zeros((1, 4), np.int64), ids], axis=1)
    mask = (np.arange(LENGTH + 4) >= 4).astype(np.int64)[None]
    (logits,) = run.run(["logits"], {"input_ids": padded, "attention_mask": mask, **empty_cache(run, 1)})
    np.testing.assert_allclose(logits[:, 4:], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_types(tmp_path: Path, stored: Any, dtype: str):
    config = config_of("gemma2")
    weights = random_weights(config, stored)
    folder(tmp_path / "hf", config, weights)
    exported = decoder.export(tmp_path / "hf", tmp_path / "model.onnx", dtype=dtype)
    assert exported.parameters == sum(array.size for array in weights.values())
    run, ids = session(tmp_path / "model.onnx"), ids_of(1)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    logits = run.run(["logits"], feeds | empty_cache(run, 1))[0]
    assert logits.dtype == np.dtype(dtype)
    np.testing.assert_allclose(logits[0], forward(config, weights, ids[0]), atol=2e-5 if dtype == "float32" else 2e-2)


def test_large_weights_go_in_pieces_to_a_file_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of("llama") | {"hidden_size": 192, "vocab_size": 100}
    weights = random_weights(config, ml_dtypes.bfloat16)
    folder(tmp_path / "hf", config, weights, shards=3)
    monkeypatch.setattr("qgraph.models.decoder_weights._PIECE", 1000)
    told = []
    exported = decoder.export(
        tmp_path / "hf", tmp_path / "m.onnx", external_above=1000, progress=lambda *step: told.append(step)
    )
    assert [file.name for file in exported.files] == ["m.onnx", "m.onnx.data"]
    assert len(told) > len(weights)
    model = qgraph.load(exported.path)
    initializers = model.graph.initializers
    for name, array in weights.items():
        stored = initializers[name].const_value.numpy()
        transposed = array.ndim == 2 and "embed" not in name
        np.testing.assert_array_equal(stored, array.astype(np.float32).T if transposed else array.astype(np.float32))


def test_the_graph_is_standard_and_repeats_to_the_byte(tmp_path: Path):
    config = config_of("gemma2")
    folder(tmp_path / "hf", config, random_weights(config))
    first = decoder.export(tmp_path / "hf", tmp_path / "a.onnx").path
    second = decoder.export(tmp_path / "hf", tmp_path / "b.onnx").path
    assert first.read_bytes() == second.read_bytes()
    proto = onnx.load(first)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    assert "Expand" not in {node.op_type for node in proto.graph.node}
    tables = [node.op_type for node in proto.graph.node if "model.embed_tokens.weight" in node.input]
    assert tables == ["Gather", "Transpose"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral': only gemma, gemma2, gemma3_text, llama, mistral, phi3,"),
        ({"num_local_experts": 8}, "num_local_experts is set: a mixture of experts is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set: quantized weights"),
        ({"hidden_act": "relu2"}, "hidden_act is 'relu2': only silu"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling of type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None: it must be a positive number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3: must divide num_attention_heads, 4"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide': must be a positive whole number"),
        ({"attention_bias": True}, "has no tensor 'model.layers.0.self_attn.q_proj.bias'"),
        ({"num_hidden_layers": 1}, "has the tensor 'model.layers.1.self_attn.q_proj.weight', which a decoder of this"),
        (
            {"intermediate_size": 40},
            r"'model.layers.0.mlp.gate_proj.weight' is \[48, 32\], but config.json makes it \[4",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: dict[str, Any], message: str):
    config = config_of("llama")
    folder(tmp_path / "hf", config | change, random_weights(config))
    with pytest.raises(UserError, match=message) as error:
        decoder.export(tmp_path / "hf", tmp_path / "model.onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*model.onnx*"))


ODD = [None, True, 0, -1, 1.5, 10**30, "", "x", [], [[]], {}, {"rope_type": []}, {"full_attention": 3}]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3"])
def test_odd_values_are_read_or_refused(tmp_path: Path, family: str):
    config = config_of(family) | {"use_sliding_window": True, "sliding_window": 4, "layer_types": None}
    for field in config:
        for value in ODD:
            (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
            with contextlib.suppress(UserError):
                read_config(tmp_path / "config.json")


def test_a_weight_beyond_float16_leaves_nothing_behind(tmp_path: Path):
    config = config_of("llama")
    weights = random_weights(config)
    weights["lm_head.weight"][3, 4] = 1e6
    folder(tmp_path / "hf", config, weights)
    with pytest.raises(UserError, match=r"'lm_head.weight' overflows float16: export with --dtype float32"):
        decoder.export(tmp_path / "hf", tmp_path / "model.onnx", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_real_checkpoint_computes_what_its_other_export_does(tmp_path: Path, assets: Path):
    """stories260K (a Llama of 260 thousand parameters), against a graph that was written by hand for it."""
    with np.load(assets / "stories260k" / "stories260K_hf_names.npz") as arrays:
        weights = dict(arrays)
    config = DEFAULTS | {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    }
    folder(tmp_path / "hf", config, weights)
    decoder.export(tmp_path / "hf", tmp_path / "model.onnx")
    run, ids = session(tmp_path / "model.onnx"), np.random.default_rng(2).integers(3, 512, (2, 300))
    (wanted,) = session(assets / "stories260k" / "stories260K.onnx").run(None, {"input_ids": ids})
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    (logits,) = run.run(["logits"], feeds | empty_cache(run, 2))
    assert np.abs(wanted).max() > 5
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)
