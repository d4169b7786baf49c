"""The tables of capabilities: what is read, what is refused, and that every table there is can be read."""

from __future__ import annotations

import re

import pytest

from qgraph import capabilities
from qgraph.capabilities import Entry, Types
from qgraph.capabilities.constraints import parse_constraint
from qgraph.errors import UserError

HEAD = """
runtime = "Some Runtime"
provider = "SomeProvider"
version = "1.2"
opset = 21
[sources]
manual = "its manual"
"""
CONV = """
[types]
floats = ["float32", "float16"]
[[operators]]
name = "Conv"
since = 11
until = 21
inputs = { 0 = ["floats", "int8"], "*" = ["float32"] }
outputs = { 0 = ["float32"] }
constraints = ["constant 1", "rank 0 in 3..5"]
source = "manual"
note = "slow"
[[operators]]
name = "Conv"
source = "manual"
[[fusions]]
pattern = "Conv -> Relu"
when = ["one reader"]
kernel = "FusedConv"
source = "manual"
"""


def test_everything_that_a_table_may_say_is_read():
    table = capabilities.parse(HEAD + CONV, "some")
    assert (table.name, table.title, table.version, table.opset) == ("some", "Some Runtime's SomeProvider", "1.2", 21)
    first, second = table.operators["Conv"]
    assert first.inputs == Types({0: ("float32", "float16", "int8")}, ("float32",))
    assert (first.inputs.of(0), first.inputs.of(7), first.outputs.of(7)) == (
        ("float32", "float16", "int8"),
        ("float32",),
        None,
    )
    assert [one.text for one in first.constraints] == ["constant 1", "rank 0 in 3..5"]
    assert (first.since, first.until, first.source, first.note) == (11, 21, "manual", "slow")
    assert second == Entry("Conv", source="manual")
    assert (table.fusions[0].kernel, table.fusions[0].when) == ("FusedConv", ("one reader",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("versoin = '1'", "the table has an unknown key 'versoin'. Did you mean 'version'?"),
        ("[[operators]]\nnam = 'Conv'", "operators 1 has an unknown key 'nam'. Did you mean 'name'?"),
        ("[[operators]]\nname = 3", "operators 1: 'name' should be text, not 3"),
        ("[[operators]]\nname = 'Conv'", "operators 1 (Conv) lacks 'source'"),
        (
            "[[operators]]\nname = 'Conv'\nsource = 'x'",
            "operators 1 (Conv): source 'x' is not among [sources] (manual)",
        ),
        ("[[operators]]\nname = 'Conv'\nsince = 'x'", "operators 1 (Conv): since should be a number from 0, not 'x'"),
        ("[[operators]]\nname = 'Conv'\ninputs = 'x'", "operators 1 (Conv): inputs should be a table of lists"),
        ("[[operators]]\nname = 'C'\ninputs = { x = ['bool'] }", "inputs: 'x' is neither an index nor '*'"),
        ("[[operators]]\nname = 'C'\ninputs = { 0 = 'bool' }", "inputs should be a list of texts, not 'bool'"),
        ("[[operators]]\nname = 'C'\ninputs = { 0 = ['float33'] }", "'float33' is no data type. Did you mean"),
        (
            "[[operators]]\nname = 'C'\nconstraints = ['konstant 1']",
            "'konstant 1' is no constraint: it begins with none",
        ),
        ("[[operators]]\nname = 'C'\nconstraints = ['constant one']", "'constant one' should read 'constant I'"),
        ("[operators]\nname = 'C'", "'operators' should be written [[operators]]"),
        ("[[fusions]]\npattern = 'A'\nsource = 'manual'", "fusions 1 lacks 'kernel'"),
        ("[conversions]\nfloat16 = 'float'", "conversions: 'float' is no data type"),
        ("x = ", "capability table some: Invalid value"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(text: str, message: str):
    head, sources = HEAD.split("[sources]")
    document = head + text + "\n[sources]" + sources
    if not text.startswith(("versoin", "x")):
        document = HEAD + text
    with pytest.raises(UserError) as error:
        capabilities.parse(document, "some")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_lacks_nothing_that_it_must_have():
    with pytest.raises(UserError, match="the table lacks 'provider'"):
        capabilities.parse("runtime = 'x'\nversion = '1'", "some")


def test_a_wrong_name_is_told_with_the_right_ones():
    with pytest.raises(UserError, match=r"there is no capability table 'onnxruntime-gpu'\."):
        capabilities.table("onnxruntime-gpu")


@pytest.mark.parametrize("name", capabilities.names())
def test_every_table_is_readable_and_has_something_to_say(name: str):
    table = capabilities.table(name)
    assert table.operators
    assert table.version
    assert all(entry.source in table.sources for entries in table.operators.values() for entry in entries)


@pytest.mark.parametrize(
    ("text", "value", "allowed"),
    [
        ("rank 0 in 3..5", "4", True),
        ("rank 0 in 3..5", "6", False),
        ("rank 0 in 2, 4", "4", True),
        ("attribute axis in -2..-1", "-1", True),
        ("attribute axis in -2..-1", "0", False),
        ("attribute auto_pad in NOTSET, none", "none", True),
        ("attribute auto_pad in NOTSET, none", "SAME_UPPER", False),
        ("attribute kernel_shape in 1 1, 3 3", "3 3", True),
    ],
)
def test_values_that_a_constraint_allows(text: str, value: str, allowed: bool):
    assert parse_constraint(text).allows(value) is allowed


PRODUCT = """
[[products]]
kernel = "QLinearConv"
weights = [3]
activations = "uint8"
stored = "int8"
when = ["depthwise"]
saturates = ["avx2"]
source = "manual"
"""


def test_how_a_kernel_adds_products_of_bytes_is_read():
    (product,) = capabilities.parse(HEAD + PRODUCT, "some").products
    assert product == capabilities.ByteProduct(
        "QLinearConv", (3,), "uint8", "int8", ("depthwise",), ("avx2",), "manual"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("weights = 3", "products 1: weights should be a list of inputs, not 3"),
        ("weights = []", "products 1: weights should be a list of inputs, not []"),
        ("weights = ['x']", "products 1: weights should be a number from 0, not 'x'"),
        ("saturates = ['sse']", "products 1: saturates: 'sse' is no processor (avx2, avx512, vnni)"),
        ("stored = 'int9'", "products 1: 'int9' is no data type"),
    ],
)
def test_a_wrong_product_is_told_in_one_line(wrong: str, message: str):
    key = wrong.partition(" ")[0]
    lines = [wrong if line.startswith(key) else line for line in PRODUCT.splitlines()]
    with pytest.raises(UserError) as error:
        capabilities.parse(HEAD + "\n".join(lines), "some")
    assert message in str(error.value)


@pytest.mark.parametrize("name", capabilities.names())
def test_every_source_names_the_release_that_it_is_of(name: str):
    table = capabilities.table(name)
    used = {one.source for entries in table.operators.values() for one in entries}
    used |= {one.source for one in (*table.fusions, *table.products)}
    assert used == set(table.sources)
    assert [text for text in table.sources.values() if re.search(r"\d+\.\d+", text) is None] == []
