"""Reading tables, which are TOML.

    runtime = "ONNX Runtime"
    provider = "CUDAExecutionProvider"          # "" for a runtime without providers
    version = "1.31.1"                          # of which the facts were taken
    opset = 26                                  # optional: the highest of the default domain that it takes
    [sources]                                   # what an entry's `source` means
    registry = "the kernel registry of the installed runtime"
    [types]                                     # optional: names for groups of data types
    floats = ["float32", "float64"]
    [conversions]                               # optional: types without a kernel that it converts by itself
    float16 = "float32"
    [[operators]]
    name = "Conv"                               # "com.microsoft.QAttention" outside the default domain
    since = 11                                  # optional: versions of the operator's domain that a model
    until = 21                                  #     imports, both inclusive
    inputs = { 0 = ["floats"], "*" = ["int64"] }    # by index; absent: any type
    outputs = { 0 = ["float32"] }
    constraints = ["constant 1", "rank 0 in 3..5"]  # see `constraints`
    source = "registry"
    note = "shown behind the reason"
    [[fusions]]                                 # what it makes of several nodes
    pattern = "DequantizeLinear -> MatMul"      # in the words of the probe that shows it
    when = ["block 16 to 256"]
    kernel = "com.microsoft.MatMulNBits"        # "" where they stay as they are
    arithmetic = "integers"                     # optional: where a kernel may compute in float too
    source = "probe"
    [[products]]                                # how a kernel, or what becomes one, adds products of bytes
    kernel = "com.microsoft.QGemm"
    weights = [3]                               # its inputs that are weights
    activations = "uint8"                       # "float32" where it quantizes them itself
    stored = "int8"                             # type of the weights
    when = ["depthwise"]                        # optional
    saturates = ["avx2", "avx512"]              # on which PROCESSORS sums of two are cut to 16 bits; others are exact
    source = "product"

Several entries of one operator are alternatives. Data types are called as numpy and ml_dtypes call them; others than
tensors as `seq(float32)`, `optional(...)`, `map(...)`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from qgraph.capabilities.constraints import Constraint, parse_constraint
from qgraph.capabilities.tables import PROCESSORS, ByteProduct, Entry, Fusion, Table, Types
from qgraph.errors import UserError, nearest

__all__ = ["DATA_TYPES", "names", "parse", "table"]

DATA_TYPES = frozenset((
    "bfloat16", "bool", "complex64", "complex128", "float4e2m1", "float8e4m3fn", "float8e4m3fnuz", "float8e5m2",
    "float8e5m2fnuz", "float8e8m0", "float16", "float32", "float64", "int2", "int4", "int8", "int16", "int32",
    "int64", "string", "uint2", "uint4", "uint8", "uint16", "uint32", "uint64",
))  # fmt: skip
_NO_TENSOR = re.compile(r"(seq|optional|map|sparse)\(.+\)")
_SUFFIX = ".toml"
_KEYS = (
    "runtime", "provider", "version", "opset", "sources", "types", "conversions", "operators", "fusions", "products",
)  # fmt: skip


def names() -> list[str]:
    """Return the names of the tables that there are, sorted."""
    files = resources.files("qgraph.capabilities").iterdir()
    return sorted(file.name.removesuffix(_SUFFIX) for file in files if file.name.endswith(_SUFFIX))


@functools.cache
def table(name: str) -> Table:
    """Return a table by its name, such as 'onnxruntime-cpu'.

    Raises:
        UserError: there is no such table, or its file is not as it should be.
    """
    if name not in names():
        raise UserError(f"there is no capability table '{name}'.{nearest(name, names())} There are: {_list(names())}.")
    return parse(resources.files("qgraph.capabilities").joinpath(name + _SUFFIX).read_text(encoding="utf-8"), name)


def parse(text: str, name: str) -> Table:
    """Read a table.

    Args:
        text: TOML.
        name: of the table; messages name it.

    Raises:
        UserError: it is no TOML, a key or a constraint is not known, or a value is of the wrong type.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"capability table {name}: {error}") from None
    try:
        return _table(document, name)
    except ValueError as error:
        raise UserError(f"capability table {name}: {error}") from None


def _table(document: Mapping[str, Any], name: str) -> Table:
    _only(document, _KEYS, "the table")
    sources = _texts(document.get("sources", {}), "sources")
    groups = {key: _types(value, {}, f"types.{key}") for key, value in _mapping(document, "types").items()}
    operators: dict[str, tuple[Entry, ...]] = {}
    for number, one in enumerate(_tables(document, "operators"), start=1):
        entry = _entry(one, groups, sources, f"operators {number}")
        operators[entry.name] = (*operators.get(entry.name, ()), entry)
    fusions = [
        _fusion(one, sources, f"fusions {number}") for number, one in enumerate(_tables(document, "fusions"), start=1)
    ]
    products = [
        _byte_product(one, sources, f"products {number}")
        for number, one in enumerate(_tables(document, "products"), start=1)
    ]
    conversions = _texts(document.get("conversions", {}), "conversions")
    for word in (*conversions, *conversions.values()):
        _types([word], {}, "conversions")
    opset = document.get("opset")
    return Table(
        name,
        _text(document, "runtime", "the table"),
        _text(document, "provider", "the table"),
        _text(document, "version", "the table"),
        None if opset is None else _number(opset, "opset"),
        sources,
        operators,
        conversions,
        tuple(fusions),
        tuple(products),
    )


def _entry(one: Mapping[str, Any], groups: Mapping[str, tuple[str, ...]], sources: Iterable[str], at: str) -> Entry:
    _only(one, [field.name for field in dataclasses.fields(Entry)], at)
    name = _text(one, "name", at)
    at = f"{at} ({name})"
    until = one.get("until")
    return Entry(
        name,
        _number(one.get("since", 0), f"{at}: since"),
        None if until is None else _number(until, f"{at}: until"),
        _slots(one.get("inputs", {}), groups, f"{at}: inputs"),
        _slots(one.get("outputs", {}), groups, f"{at}: outputs"),
        tuple(_constraint(text, at) for text in _lines(one.get("constraints", []), f"{at}: constraints")),
        _source(one, sources, at),
        _text(one, "note", at, default=""),
    )


def _fusion(one: Mapping[str, Any], sources: Iterable[str], at: str) -> Fusion:
    _only(one, [field.name for field in dataclasses.fields(Fusion)], at)
    return Fusion(
        _text(one, "pattern", at),
        _lines(one.get("when", []), f"{at}: when"),
        _text(one, "kernel", at),
        _source(one, sources, at),
        _text(one, "arithmetic", at, default=""),
    )


def _byte_product(one: Mapping[str, Any], sources: Iterable[str], at: str) -> ByteProduct:
    _only(one, [field.name for field in dataclasses.fields(ByteProduct)], at)
    weights = one.get("weights")
    if not isinstance(weights, list) or not weights:
        raise ValueError(f"{at}: weights should be a list of inputs, not {weights!r}")
    activations, stored = (_text(one, key, at) for key in ("activations", "stored"))
    _types([activations, stored], {}, at)
    saturates = _lines(one.get("saturates", []), f"{at}: saturates")
    for name in saturates:
        if name not in PROCESSORS:
            raise ValueError(f"{at}: saturates: '{name}' is no processor ({_list(PROCESSORS)})")
    return ByteProduct(
        _text(one, "kernel", at),
        tuple(_number(index, f"{at}: weights") for index in weights),
        activations,
        stored,
        _lines(one.get("when", []), f"{at}: when"),
        saturates,
        _source(one, sources, at),
    )


def _source(one: Mapping[str, Any], sources: Iterable[str], at: str) -> str:
    source = _text(one, "source", at)
    if source not in sources:
        raise ValueError(f"{at}: source '{source}' is not among [sources] ({_list(sources)})")
    return source


def _constraint(text: str, at: str) -> Constraint:
    try:
        return parse_constraint(text)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None


def _slots(value: Any, groups: Mapping[str, tuple[str, ...]], at: str) -> Types:
    if not isinstance(value, dict):
        raise ValueError(f"{at} should be a table of lists, by index")
    indices = {key: _types(words, groups, at) for key, words in value.items()}
    others = indices.pop("*", None)
    if not all(key.isdigit() for key in indices):
        raise ValueError(f"{at}: '{next(key for key in indices if not key.isdigit())}' is neither an index nor '*'")
    return Types({int(key): words for key, words in indices.items()}, others)


def _types(value: Any, groups: Mapping[str, tuple[str, ...]], at: str) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for word in _lines(value, at):
        if word in groups:
            found |= dict.fromkeys(groups[word])
        elif word in DATA_TYPES or _NO_TENSOR.fullmatch(word):
            found[word] = None
        else:
            raise ValueError(f"{at}: '{word}' is no data type.{nearest(word, {*DATA_TYPES, *groups})}")
    return tuple(found)


def _only(one: Any, known: Sequence[str], at: str) -> None:
    if not isinstance(one, dict):
        raise ValueError(f"{at} should be a table")
    for key in one:
        if key not in known:
            raise ValueError(f"{at} has an unknown key '{key}'.{nearest(key, known)}")


def _text(one: Mapping[str, Any], key: str, at: str, default: str | None = None) -> str:
    value = one.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{at} lacks '{key}'" if value is None else f"{at}: '{key}' should be text, not {value!r}")
    return value


def _number(value: Any, at: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{at} should be a number from 0, not {value!r}")
    return value


def _lines(value: Any, at: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{at} should be a list of texts, not {value!r}")
    return tuple(value)


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = document.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"'{key}' should be a table")
    return value


def _texts(value: Any, at: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise ValueError(f"'{at}' should be a table of texts")
    return dict(value)


def _tables(document: Mapping[str, Any], key: str) -> list[Any]:
    value = document.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"'{key}' should be written [[{key}]]")
    return value


def _list(words: Iterable[str]) -> str:
    return ", ".join(words) or "none"
