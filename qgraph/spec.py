"""The text form of pipelines, and the conversion of option text to a dataclass's fields.

Grammar (white space between tokens is free; a bare word holds none of `{}[],="` and no space):

    pipeline := [pass ("," pass)*]
    pass     := word ["{" option ("," option)* "}"]
    option   := word "=" value
    value    := atom | "[" [atom ("," atom)*] "]"
    atom     := word | JSON string

A word may be a number, true, false or none where the option's type allows it; a JSON string is always text. A recipe's
TOML strings mean what the same characters mean here, so `x = "none"` is none and `x = '"none"'` the text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from qgraph.errors import UserError, nearest

__all__ = [
    "Spec",
    "Value",
    "build",
    "defaults",
    "format_specs",
    "format_toml",
    "parse_setting",
    "parse_specs",
    "read_toml_value",
    "require_option",
    "to_spec",
]

Atom = str | int | float | bool | None
Value = Atom | Sequence[Atom]

_TOKEN = re.compile(r'\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[^\s{}\[\],="]+)|(?P<mark>[{}\[\],=]))')
_BARE = re.compile(r'[^\s{}\[\],="]+')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


@dataclasses.dataclass(frozen=True)
class Spec:
    """A pass (or target) by name, with the options that were written down; values are text or already typed."""

    name: str
    options: Mapping[str, Value] = dataclasses.field(default_factory=dict)


class _Quoted(str):
    """An atom that was written in quotation marks: it is text, whatever it looks like."""


def parse_specs(text: str) -> list[Spec]:
    """Parse the text form of a pipeline.

    Raises:
        UserError: the text does not follow the grammar; the message gives the position.
    """
    return _Parser(text).pipeline()


def parse_setting(text: str) -> tuple[str, str, Value]:
    """Parse PASS.OPTION=VALUE into the pass's name, the option's name as a field is written, and the value.

    Raises:
        UserError: the text does not follow that form.
    """
    target, equals, value = text.partition("=")
    name, dot, option = target.strip().partition(".")
    if not (equals and dot and _BARE.fullmatch(name) and _BARE.fullmatch(option)):
        raise UserError(f"a setting is written PASS.OPTION=VALUE, not '{text}'")
    return name, option.replace("-", "_"), _Parser(value).whole_value()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def pipeline(self) -> list[Spec]:
        if not self.text.strip():
            return []
        specs = [self._spec()]
        while self._accept(","):
            specs.append(self._spec())
        if self._peek() is not None:
            raise self._error("a comma or the end")
        return specs

    def whole_value(self) -> Value:
        value = self._value()
        if self._peek() is not None:
            raise self._error("the end (a list is written [a,b])")
        return value

    def _spec(self) -> Spec:
        name = self._word("the name of a pass")
        if not self._accept("{"):
            return Spec(name)
        options: dict[str, Value] = {}
        while not self._accept("}"):
            if options:
                self._expect(",")
            key = self._word("an option").replace("-", "_")
            self._expect("=")
            if key in options:
                raise UserError(f"option '{key}' of '{name}' is given twice")
            options[key] = self._value()
        return Spec(name, options)

    def _value(self) -> Value:
        if not self._accept("["):
            return self._atom()
        atoms: list[Atom] = []
        while not self._accept("]"):
            if atoms:
                self._expect(",")
            atoms.append(self._atom())
        return atoms

    def _peek(self) -> re.Match[str] | None:
        match = _TOKEN.match(self.text, self.position)
        if match is None and self.text[self.position :].strip():
            raise self._error("a closed quotation mark")
        return match

    def _accept(self, mark: str) -> bool:
        match = self._peek()
        if match is None or match["mark"] != mark:
            return False
        self.position = match.end()
        return True

    def _expect(self, mark: str) -> None:
        if not self._accept(mark):
            raise self._error(f"'{mark}'")

    def _word(self, what: str) -> str:
        match = self._peek()
        if match is None or match["word"] is None:
            raise self._error(what)
        self.position = match.end()
        return match["word"]

    def _atom(self) -> str:
        match = self._peek()
        if match is None or match["mark"] is not None:
            raise self._error("a value")
        self.position = match.end()
        if match["string"] is None:
            return match["word"]
        try:
            return _Quoted(json.loads(match["string"]))
        except json.JSONDecodeError as error:
            raise UserError(f"{match['string']} is not a JSON string ({error.msg})") from None

    def _error(self, expected: str) -> UserError:
        rest = self.text[self.position :].strip()
        where = f"at column {self.position + 1}, before '{rest[:20]}'" if rest else "at the end"
        return UserError(f"'{self.text}': expected {expected} {where}")


def format_specs(specs: Sequence[Spec]) -> str:
    """Write specs in the text form; `parse_specs` reads it back."""
    return ",".join(_format_spec(spec) for spec in specs)


def _format_spec(spec: Spec) -> str:
    if not spec.options:
        return spec.name
    options = ",".join(f"{key}={_format_value(value)}" for key, value in spec.options.items())
    return f"{spec.name}{{{options}}}"


def _format_value(value: Value) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(_format_atom(atom) for atom in value)}]"
    return _format_atom(value)


def _format_atom(atom: Atom) -> str:
    if isinstance(atom, str):
        return str(atom) if _BARE.fullmatch(atom) and _reads_as_text(atom) else _json_string(atom)
    if atom is None:
        return "none"
    if isinstance(atom, bool):
        return "true" if atom else "false"
    # numpy's float64 is a float whose repr is not a number
    return repr(float(atom)) if isinstance(atom, float) else repr(int(atom))


def _json_string(text: str) -> str:
    """Quote as JSON, without the surrogate pairs and the raw DEL that TOML forbids."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _reads_as_text(word: str) -> bool:
    return isinstance(_plain(word), str)


def format_toml(value: Value) -> str:
    """Write a value for a TOML recipe; `read_toml_value` of what a TOML parser reads there gives it back."""
    if isinstance(value, str):
        plain = _reads_as_text(value) and not _STRING.fullmatch(value)
        return _json_string(value if plain else _json_string(value))
    if isinstance(value, Sequence):
        return f"[{', '.join(format_toml(item) for item in value)}]"
    return '"none"' if value is None else _format_atom(value)


def read_toml_value(value: Any, where: str) -> Value:
    """Return the value that a TOML parser's result stands for.

    Raises:
        UserError: it is a table, a date or a nested list; the message starts with `where`.
    """
    if isinstance(value, list):
        return [_toml_atom(item, where) for item in value]
    return _toml_atom(value, where)


def _toml_atom(value: Any, where: str) -> Atom:
    if not isinstance(value, str | int | float):
        raise UserError(f"{where} must be text, a number, true, false or a list of these")
    if isinstance(value, str) and _STRING.fullmatch(value):
        with contextlib.suppress(json.JSONDecodeError):
            return _Quoted(json.loads(value))
    atom: Atom = value
    return atom


def _plain(text: str) -> Atom:
    """Read a bare word as TOML would: none, true, false, a number or text."""
    constants: dict[str, Atom] = {"none": None, "true": True, "false": False}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def defaults(cls: type) -> dict[str, tuple[str, str, str]]:
    """Return name -> (type, default, help) of every option of a pass or target class, for listings."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: (
            _describe(hints[field.name]),
            "required" if field.default is dataclasses.MISSING else _format_value(field.default),
            str(field.metadata.get("help", "")),
        )
        for field in dataclasses.fields(cls)
    }


def to_spec(instance: Any) -> Spec:
    """Return the spec of a pass: its name and the options that differ from their defaults."""
    options = {
        field.name: getattr(instance, field.name)
        for field in dataclasses.fields(instance)
        if getattr(instance, field.name) != field.default
    }
    return Spec(instance.name, options)


def build(cls: type, spec: Spec) -> Any:
    """Make an instance of the dataclass `cls` from the options of `spec`.

    Raises:
        UserError: an option is unknown, missing or of the wrong type; the nearest known name is suggested.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in spec.options.items():
        require_option(cls, spec.name, key)
        values[key] = _convert(value, hints[key], f"option '{key}' of '{spec.name}'")
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise UserError(f"'{spec.name}' needs the option '{key}' ({_describe(hints[key])})")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"'{spec.name}': {error}") from None


def require_option(cls: type, name: str, option: str) -> None:
    """Raise a UserError, with the nearest name, when the dataclass `cls`, called `name`, has no such option."""
    fields = [field.name for field in dataclasses.fields(cls)]
    if option not in fields:
        known = f"It has: {', '.join(fields)}." if fields else "It has no options."
        raise UserError(f"'{name}' has no option '{option}'.{nearest(option, fields)} {known}")


def _convert(value: Value, hint: Any, where: str) -> Any:
    converted = _first_fit(value, hint)
    if converted is not _NO:
        return converted
    shown = str(value) if isinstance(value, str) else _format_value(value)
    choices = [str(c) for kind in _alternatives(hint) for c in typing.get_args(kind) if isinstance(c, str)]
    suggestion = nearest(str(value), choices) if choices else ""
    raise UserError(f"{where} is '{shown}', but must be {_describe(hint)}.{suggestion}")


_NO = object()


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _first_fit(value: Value, hint: Any) -> Any:
    """Return `value` as an instance of the first alternative of `hint` that takes it, or _NO."""
    # None first: of `str | None` it is the narrower one.
    kinds = sorted(_alternatives(hint), key=lambda kind: kind is not types.NoneType)
    fits = (_try(value, kind) for kind in kinds)
    return next((fit for fit in fits if fit is not _NO), _NO)


def _text(atom: Atom) -> str:
    return atom if isinstance(atom, str) else _format_atom(atom)


def _try_tuple(value: Value, kinds: tuple[Any, ...]) -> Any:
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(items)
    if len(items) != len(kinds):
        return _NO
    converted = tuple(_first_fit(item, kind) for item, kind in zip(items, kinds, strict=True))
    return _NO if any(item is _NO for item in converted) else converted


def _try(value: Value, kind: Any) -> Any:
    """Return `value` as an instance of `kind`, or _NO."""
    if typing.get_origin(kind) is tuple:
        return _try_tuple(value, typing.get_args(kind))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _NO
    if typing.get_origin(kind) is typing.Literal:
        return next((choice for choice in typing.get_args(kind) if _text(choice) == _text(value)), _NO)
    if kind is str:
        return str(value) if isinstance(value, str) else _NO
    plain = _plain(value) if isinstance(value, str) and not isinstance(value, _Quoted) else value
    if kind is types.NoneType:
        return None if plain is None else _NO
    if kind is bool:
        return plain if isinstance(plain, bool) else _NO
    if isinstance(plain, bool):
        return _NO
    if kind is int:
        return plain if isinstance(plain, int) else _NO
    if kind is float and isinstance(plain, int | float) and math.isfinite(plain):
        return float(plain)
    return _NO


def _describe(hint: Any) -> str:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "none"}
    parts = []
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is typing.Literal:
            parts.append(" | ".join(str(choice) or "''" for choice in typing.get_args(kind)))
        elif typing.get_origin(kind) is tuple:
            parts.append(_describe_tuple(typing.get_args(kind)))
        else:
            parts.append(names.get(kind, str(kind)))
    return " or ".join(parts)


def _describe_tuple(kinds: tuple[Any, ...]) -> str:
    if kinds[-1] is Ellipsis:
        return f"a list [a,b,...], each {_describe(kinds[0])}"
    return f"a list [{', '.join(_describe(kind) for kind in kinds)}]"
