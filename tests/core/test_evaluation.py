"""Perplexity against a slow loop over the protocol, and text as windows of tokens."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.errors import UserError
from qgraph.evaluation import perplexity, text_perplexity
from qgraph.feeds import InputSpec, signature
from qgraph.samples import open_samples

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import sentencepiece

VOCABULARY = 256
TABLE = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32) * 2


def model(length: int | str = "s", batch: int | str = "n") -> ir.Model:
    """Predict from the mean of the logits of all tokens so far, so that context counts and what follows does not."""
    ids = ir.val("input_ids", ir.DataType.INT64, [batch, length])
    tape = ir.tape.Tape()
    rows = tape.op("Gather", [tape.initializer(ir.tensor(TABLE, name="table")), ids])
    axis = tape.initializer(ir.tensor(np.array(1), name="axis"))
    one = {"value": ir.tensor(np.ones(1, np.float32))}
    counts = tape.op("CumSum", [tape.op("ConstantOfShape", [tape.op("Shape", [rows])], one), axis])
    logits = tape.op("Div", [tape.op("CumSum", [rows, axis]), counts])
    logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape([batch, length, VOCABULARY])
    graph = ir.Graph(
        [ids], [logits], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 21}, name="means"
    )
    return ir.Model(graph, ir_version=10, producer_name="tests")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    qgraph.save(model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def slow(documents: list[np.ndarray], window: int, stride: int) -> tuple[float, int]:
    """Follow the guide word for word: labels of context are masked, then shifted by one."""
    total, count = 0.0, 0
    for ids in documents:
        end_before = 0
        for begin in range(0, len(ids), stride):
            end = min(begin + window, len(ids))
            tokens, labels = ids[begin:end], ids[begin:end].copy()
            labels[: len(labels) - (end - end_before)] = -100
            for place in range(len(tokens) - 1):
                if labels[place + 1] == -100:
                    continue
                logits = TABLE[tokens[: place + 1]].astype(np.float64).mean(axis=0)
                total -= logits[labels[place + 1]] - math.log(np.exp(logits).sum())
                count += 1
            end_before = end
            if end == len(ids):
                break
    return total / count, count


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 4), (8, 3), (8, 1), (100, 50), (2, 1)])
@pytest.mark.parametrize("batch", [None, 1, 5])
def test_the_protocol_is_the_guides(path: Path, window: int, stride: int, batch: int | None):
    random = np.random.default_rng(1)
    documents = [random.integers(0, VOCABULARY, length) for length in (41, 9, 2, 1, 17)]
    found = perplexity(path, documents, window=window, stride=stride, batch=batch, text_bytes=140, threads=1)
    nats, count = slow(documents, window, stride)
    assert found.tokens == count
    assert found.nats == pytest.approx(nats, abs=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) * 70 / 140)
    assert json.loads(json.dumps(found.to_json()))["windows"] == found.windows


def test_fixed_shapes_are_filled_up(tmp_path: Path):
    qgraph.save(model(6, batch=4), tmp_path / "model.onnx")
    documents = [np.arange(23), np.arange(100, 103)]
    found = perplexity(tmp_path / "model.onnx", documents, stride=2, threads=1)
    assert (found.window, found.tokens) == (6, slow(documents, 6, 2)[1])
    assert found.nats == pytest.approx(slow(documents, 6, 2)[0], abs=1e-6)
    with pytest.raises(UserError, match="the model reads 6 tokens at once: a window of 8 does not fit"):
        perplexity(tmp_path / "model.onnx", documents, window=8)


def test_a_text_of_bytes(path: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("Grüße, twice.\nAnd more.\n")
    ids = np.frombuffer((tmp_path / "text.txt").read_bytes(), np.uint8)
    found = text_perplexity(path, tmp_path / "text.txt", "bytes", window=10, stride=5, threads=1)
    assert found.nats == pytest.approx(slow([ids.astype(int)], 10, 5)[0], abs=1e-6)
    assert found.bytes_per_token == 1.0


def test_what_cannot_be_scored_is_said(path: Path, tmp_path: Path):
    def refused(message: str, ids: object, **options: int) -> None:
        with pytest.raises(UserError, match=message) as error:
            perplexity(path, ids, **options)
        assert "\n" not in str(error.value)

    refused("fewer than two tokens", [3])
    refused("fewer than two tokens", [])
    refused(r"must be integers along one axis, not float64 of \[2\]", np.array([1.0, 2.0]))
    refused("must not be negative: there is -1", [1, -1])
    refused("the text has token 256, but the model only those below 256", [1, 256])
    refused("a window of 1 tokens", [1, 2], window=1)
    refused("stride must lie between 1 and the window, 4, not be 5", [1, 2], window=4, stride=5)
    broken = model()
    broken.graph.initializers["table"].const_value = ir.tensor(np.full_like(TABLE, np.nan), name="table")
    qgraph.save(broken, tmp_path / "broken.onnx")
    with pytest.raises(UserError, match="logits are not finite"):
        perplexity(tmp_path / "broken.onnx", [1, 2, 3])


def test_a_tokenizer_of_another_model_is_refused(path: Path, tmp_path: Path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    source = tmp_path / "pieces.json"
    source.write_text(json.dumps({"pieces": pieces, "scores": [0.0] * len(pieces)}))
    sentencepiece.write_tokenizer(source, tmp_path / "tokenizer.json")
    (tmp_path / "text.txt").write_text("a b")
    with pytest.raises(UserError, match="has 260 tokens and the model 256: they do not belong together"):
        text_perplexity(path, tmp_path / "text.txt", tmp_path / "tokenizer.json")


CACHE = [
    InputSpec("input_ids", "int64", (None, None), 256),
    InputSpec("attention_mask", "int64", (None, None)),
    InputSpec("position_ids", "int64", (None, None)),
    InputSpec("past_key_values.0.key", "float32", (None, 2, None, 8)),
    InputSpec("past_key_values.0.value", "float16", (None, 2, None, 8)),
    InputSpec("use_cache_branch", "bool", (1,)),
]


def test_windows_of_a_text_feed_a_model_with_a_cache(tmp_path: Path):
    path = tmp_path / "text.jsonl"
    path.write_text('"abcd"\n{"text": "efghij"}\n')
    samples = open_samples(path, CACHE, tokenizer=Path("bytes"), window=4, batch=2)
    (first,) = samples
    assert [bytes(row.astype(np.uint8)) for row in first["input_ids"]] == [b"abcd", b"efgh"]
    assert first["attention_mask"].tolist() == [[1] * 4] * 2
    assert first["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert first["past_key_values.0.key"].shape == (2, 2, 0, 8)
    assert first["past_key_values.0.value"].dtype == np.float16
    assert first["use_cache_branch"].tolist() == [False]
    assert len(open_samples(path, CACHE, tokenizer=Path("bytes"), window=4)) == 2


def test_windows_that_do_not_fit_are_refused(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("short")
    with pytest.raises(UserError, match="has 5 tokens, too few for one window of 512: give more text, or a smaller"):
        open_samples(path, CACHE, tokenizer=Path("bytes"))
    narrow = [InputSpec("input_ids", "int64", (None, None), 100)]
    with pytest.raises(UserError, match="has token 116, but the model only those below 100: the tokenizer belongs to"):
        open_samples(path, narrow, tokenizer=Path("bytes"), window=2)
    fixed = [InputSpec("input_ids", "int64", (2, 4))]
    with pytest.raises(UserError, match="too few for a feed of 2 windows of 4"):
        open_samples(path, fixed, tokenizer=Path("bytes"))
    with pytest.raises(UserError, match="reads 4 tokens at once: a window of 5 does not fit"):
        open_samples(path, fixed, tokenizer=Path("bytes"), window=5)
    odd = [CACHE[0], InputSpec("past_key_values.0.key", "float32", (None, None, None, None))]
    with pytest.raises(UserError, match="cannot be filled with an empty cache"):
        open_samples(path, odd, tokenizer=Path("bytes"), window=2)


def test_the_rows_of_the_table_that_an_input_indexes_bound_it():
    (ids,) = signature(model())
    assert ids.below == VOCABULARY


def test_the_published_figure_of_a_real_model(assets: Path, tmp_path: Path):
    """stories260K: 1.4396 nats a token over the first 512 tokens of each story; here of every 20th."""
    from qgraph.tokens import open_tokenizer, read_documents

    pieces = assets / "stories260k" / "tok512.json"
    sentencepiece.write_tokenizer(pieces, tmp_path / "tokenizer.json")
    texts = read_documents(assets / "text_lm" / "tinystories_dev.jsonl")
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    documents = tokenizer.encode(texts)
    assert sum(min(len(one.ids), 512) - 1 for one in documents) == 188069
    for text in [texts[0][:300], "naïve 日本\t<0x41> x"]:
        assert tokenizer.encode([text])[0].ids.tolist() == sentencepiece.llama2c_encode(pieces, text)
    few = [one.ids[:512] for one in documents[::20]]
    found = perplexity(assets / "stories260k" / "stories260K.onnx", few, window=512, stride=512, threads=1)
    assert found.nats == pytest.approx(1.4396, abs=0.1)
