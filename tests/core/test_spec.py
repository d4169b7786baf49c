"""The text form of pipelines and the conversion of options."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from typing import ClassVar, Literal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qgraph.errors import UserError
from qgraph.spec import (
    Spec,
    build,
    defaults,
    format_specs,
    format_toml,
    parse_setting,
    parse_specs,
    read_toml_value,
    to_spec,
)


@dataclasses.dataclass(frozen=True)
class Everything:
    """One option of every kind."""

    name: ClassVar[str] = "everything"
    flag: bool = False
    count: int = 3
    ratio: float = 0.5
    label: str = "x"
    maybe: str | None = "auto"
    limit: int | None = None
    either: int | str = "all"
    method: Literal["min-max", "entropy"] = "min-max"
    bits: Literal[4, 8] = 8
    exclude: tuple[str, ...] = ()
    pair: tuple[int, int] = (1, 1)
    levels: tuple[float | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Needy:
    name: ClassVar[str] = "needy"
    of: str


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
EVERYTHING = st.builds(
    Everything,
    flag=st.booleans(),
    count=st.integers(),
    ratio=FLOATS,
    label=TEXTS,
    maybe=st.none() | TEXTS,
    limit=st.none() | st.integers(),
    either=st.integers() | TEXTS,
    method=st.sampled_from(["min-max", "entropy"]),
    bits=st.sampled_from([4, 8]),
    exclude=st.lists(TEXTS, max_size=3).map(tuple),
    pair=st.tuples(st.integers(), st.integers()),
    levels=st.lists(st.none() | FLOATS, max_size=3).map(tuple),
)


@given(EVERYTHING)
@example(Everything(label="none", maybe="none", either="8", exclude=("true", "", 'a"b', '"q"', "1e5")))
@example(Everything(label="\U0001f600\x7f\x00\n", maybe=None, exclude=("nan", "inf", "{}", "a,b")))
def test_text_gives_the_same_options_back(instance: Everything):
    text = format_specs([to_spec(instance), to_spec(instance)])
    assert [build(Everything, spec) for spec in parse_specs(text)] == [instance, instance]


@given(EVERYTHING)
@example(Everything(label="none", maybe="none", either="8", exclude=("true", "", 'a"b', '"q"', '"\\x"')))
@example(Everything(label="\U0001f600\x7f\x00\n", maybe=None))
def test_toml_gives_the_same_options_back(instance: Everything):
    text = "".join(f"{key} = {format_toml(value)}\n" for key, value in to_spec(instance).options.items())
    read = {key: read_toml_value(value, key) for key, value in tomllib.loads(text).items()}
    assert build(Everything, Spec("everything", read)) == instance


def test_a_spec_holds_only_what_differs_from_the_defaults():
    assert to_spec(Everything()) == Spec("everything")
    assert format_specs([to_spec(Everything(count=4, exclude=("a b", "c")))]) == 'everything{count=4,exclude=["a b",c]}'


def test_numpy_numbers_are_written_as_numbers():
    assert format_specs([to_spec(Everything(ratio=np.float64(0.25)))]) == "everything{ratio=0.25}"


def test_white_space_and_hyphens_are_free():
    (spec,) = parse_specs("  everything { exclude = [ a , b ] , count = 7 } ")
    assert spec == Spec("everything", {"exclude": ["a", "b"], "count": "7"})
    assert parse_specs("x{per-channel=true}") == [Spec("x", {"per_channel": "true"})]
    assert parse_specs(" \n") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,", "'a,': expected the name of a pass at the end"),
        ("a b", "'a b': expected a comma or the end at column 2, before 'b'"),
        ("a{", "'a{': expected an option at the end"),
        ("a{x}", "'a{x}': expected '=' at column 4, before '}'"),
        ("a{x=}", "'a{x=}': expected a value at column 5, before '}'"),
        ("a{x=1 y=2}", "'a{x=1 y=2}': expected ',' at column 6, before 'y=2}'"),
        ("a{x=[1,2}", "'a{x=[1,2}': expected ',' at column 9, before '}'"),
        ('a{x="1}', "'a{x=\"1}': expected a closed quotation mark at column 5, before '\"1}'"),
        ('a{x="\\q"}', '"\\q" is not a JSON string (Invalid \\escape)'),
        ("a{x=1,x=2}", "option 'x' of 'a' is given twice"),
        ("a{p-q=1,p_q=2}", "option 'p_q' of 'a' is given twice"),
    ],
)
def test_what_does_not_parse_is_told_with_its_place(text: str, message: str):
    with pytest.raises(UserError) as error:
        parse_specs(text)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuont": "1"}, "'everything' has no option 'cuont'. Did you mean 'count'? It has: flag, count, ratio, "),
        ({"count": "1.5"}, "option 'count' of 'everything' is '1.5', but must be an integer."),
        ({"count": True}, "option 'count' of 'everything' is 'true', but must be an integer."),
        ({"flag": "1"}, "option 'flag' of 'everything' is '1', but must be true or false."),
        ({"ratio": "nan"}, "option 'ratio' of 'everything' is 'nan', but must be a number."),
        ({"method": "entropi"}, "must be min-max | entropy. Did you mean 'entropy'?"),
        ({"bits": "5"}, "option 'bits' of 'everything' is '5', but must be 4 | 8."),
        ({"pair": ["1", "2", "3"]}, 'is \'["1","2","3"]\', but must be a list [an integer, an integer].'),
        ({"label": ["a"]}, "option 'label' of 'everything' is '[a]', but must be text."),
        ({"levels": ["x"]}, "must be a list [a,b,...], each a number or none."),
    ],
)
def test_options_that_do_not_fit_are_told(options: dict, message: str):
    with pytest.raises(UserError) as error:
        build(Everything, Spec("everything", options))
    assert message in str(error.value)


def test_a_required_option_is_asked_for():
    with pytest.raises(UserError, match=r"^'needy' needs the option 'of' \(text\)$"):
        build(Needy, Spec("needy"))


def test_options_read_as_their_types_say():
    (spec,) = parse_specs(
        "everything{flag=TRUE,ratio=2,label=8,maybe=none,either=8,bits=4,exclude=one,levels=[1,none]}"
    )
    built = build(Everything, spec)
    assert built == Everything(True, 3, 2.0, "8", None, None, 8, "min-max", 4, ("one",), (1, 1), (1.0, None))
    assert type(built.ratio) is float
    assert type(built.bits) is int
    (quoted,) = parse_specs('everything{maybe="none",either="8"}')
    assert build(Everything, quoted) == Everything(maybe="none", either="8")


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("qdq.per-channel=false", ("qdq", "per_channel", "false")),
        ("qdq.exclude=[a, b]", ("qdq", "exclude", ["a", "b"])),
        ('qdq.exclude="a=b,c"', ("qdq", "exclude", "a=b,c")),
    ],
)
def test_settings(text: str, setting: tuple):
    assert parse_setting(text) == setting


@pytest.mark.parametrize(
    "text", ["", "qdq", "qdq.x", "x=1", ".x=1", "qdq.=1", "q{.x=1", "qdq.x=", "qdq.x=1},evil{y=2", "qdq.x=a,b"]
)
def test_settings_of_another_form_are_refused(text: str):
    with pytest.raises(UserError):
        parse_setting(text)


def test_listings_show_type_and_default():
    shown = defaults(Everything)
    assert shown["flag"] == ("true or false", "false", "")
    assert shown["method"] == ("min-max | entropy", "min-max", "")
    assert shown["limit"] == ("an integer or none", "none", "")
    assert shown["exclude"] == ("a list [a,b,...], each text", "[]", "")
    assert defaults(Needy) == {"of": ("text", "required", "")}


def test_infinity_has_no_text_form():
    (spec,) = parse_specs(format_specs([to_spec(Everything(ratio=math.inf))]))
    with pytest.raises(UserError, match="must be a number"):
        build(Everything, spec)
