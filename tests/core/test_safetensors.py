"""Reading safetensors: what is written comes back, and what is damaged is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qgraph.errors import UserError
from qgraph.safetensors import open_safetensors

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def write(path: Path, header: dict[str, Any] | str, data: bytes = bytes(range(32))) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def index(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_tensors_of_every_float_type_come_back(tmp_path: Path):
    # A header of odd length: no tensor is aligned.
    half = {"dtype": "F16", "shape": [], "data_offsets": [32, 34]}
    path = write(tmp_path / "x.safetensors", {"__metadata__": {"k": "v"}, "a": A, "b": B, "c": half}, bytes(range(34)))
    tensors = open_safetensors(path)
    data = bytes(range(34))
    assert list(tensors) == ["a", "b", "c"]
    np.testing.assert_array_equal(tensors["a"].numpy(), np.frombuffer(data[:24], "<f4").reshape(2, 3))
    np.testing.assert_array_equal(tensors["b"].numpy(), np.frombuffer(data[24:32], ml_dtypes.bfloat16))
    assert tensors["c"].numpy() == np.frombuffer(data[32:], "<f2")[0]
    assert not tensors["a"].numpy().flags.writeable
    np.testing.assert_array_equal(tensors.rows("a", 1, 2).numpy(), tensors["a"].numpy()[1:2])


def test_a_folder_with_an_index_is_one_mapping(tmp_path: Path):
    write(tmp_path / "1.safetensors", {"a": A})
    write(tmp_path / "2.safetensors", {"b": B})
    index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    tensors = open_safetensors(tmp_path)
    assert sorted(tensors) == ["a", "b"]
    assert tensors["b"].path.name == "2.safetensors"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            {"a": A | {"data_offsets": [16, 40]}},
            r"tensor 'a' ends at byte \d+, but the file has only \d+: it is cut off",
        ),
        ({"a": A | {"data_offsets": [0, 20]}}, r"tensor 'a' has 20 bytes, but F32 \[2, 3\] needs 24"),
        ({"a": A | {"data_offsets": [24, 0]}}, "tensor 'a' has -24 bytes"),
        ({"a": A, "b": B | {"data_offsets": [20, 28]}}, "tensors 'a' and 'b' overlap"),
        ({"a": A | {"dtype": "F33"}}, "tensor 'a' is of type 'F33', which is not known"),
        ({"a": A | {"shape": [2, -3]}}, "tensor 'a' has no valid shape and data_offsets"),
        ({"a": "nothing"}, "tensor 'a' is of type None"),
        ("[1]", "holds list where a JSON object should be"),
        ("{", "does not hold valid JSON"),
        (f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}', "'a' is there twice"),
    ],
)
def test_damage_is_named(tmp_path: Path, header: Any, message: str):
    path = write(tmp_path / "x.safetensors", header)
    with pytest.raises(UserError, match=message) as error:
        open_safetensors(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is cut off in its header: it has 0 bytes"),
        (b"\x07\0\0", "is cut off in its header: it has 3 bytes"),
        (b"\x07\0\0\0\0\0\0\0{}", "is cut off in its header"),
        (b"PK\x03\x04 an archive of something", "is no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_safetensors(tmp_path)


def missing_shard(folder: Path) -> None:
    (folder / "2.safetensors").unlink()


def named_twice(folder: Path) -> None:
    write(folder / "2.safetensors", {"b": B, "a": A})


def missing_tensor(folder: Path) -> None:
    write(folder / "2.safetensors", {"c": B})


def elsewhere(folder: Path) -> None:
    index(folder, {"a": "../1.safetensors"})


def two_without_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (missing_shard, r"lacks 2.safetensors, which model.safetensors.index.json names"),
        (named_twice, r"tensor 'a' is there twice: in .*1.safetensors and .*2.safetensors"),
        (missing_tensor, "2.safetensors lacks the tensor 'b'"),
        (elsewhere, r"names the file '../1.safetensors', outside its folder"),
        (two_without_index, "holds 2 .safetensors files and no model.safetensors.index.json"),
    ],
)
def test_shards_that_do_not_fit(tmp_path: Path, break_it: Callable[[Path], None], message: str):
    write(tmp_path / "1.safetensors", {"a": A})
    write(tmp_path / "2.safetensors", {"b": B})
    index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    break_it(tmp_path)
    with pytest.raises(UserError, match=message):
        open_safetensors(tmp_path)


def test_looking_up_what_is_not_there_or_no_weight(tmp_path: Path):
    path = write(tmp_path / "x.safetensors", {"layer.weight": A, "codes": B | {"dtype": "I16"}})
    with pytest.raises(UserError, match=r"no tensor 'layer.weigth'. Did you mean 'layer.weight'"):
        open_safetensors(path)["layer.weigth"]
    with pytest.raises(UserError, match=r"x.safetensors: tensor 'codes' is I16, and weights must be F32, F16, BF16"):
        open_safetensors(path)["codes"]
    with pytest.raises(UserError, match="does not exist"):
        open_safetensors(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        open_safetensors(tmp_path / "empty")
