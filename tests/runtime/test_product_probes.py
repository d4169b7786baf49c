"""How kernels add products of bytes on the processor at hand, and what is said where the table says otherwise."""

from __future__ import annotations

import dataclasses

import pytest

from qgraph import capabilities, cli_pages
from qgraph.capabilities import Table
from qgraph.runtime import capability_check
from qgraph.runtime.capability_check import TableCheck
from qgraph.runtime.processor import product_processor
from qgraph.runtime.product_probes import FORMS, found_products


@pytest.fixture(scope="module")
def table() -> Table:
    """Return the table if the installed release is the one that it was taken of."""
    import onnxruntime

    found = capabilities.table("onnxruntime-cpu")
    if onnxruntime.__version__ != found.version:
        pytest.skip(f"the table is of ONNX Runtime {found.version}, not of {onnxruntime.__version__}")
    return found


def test_sums_on_this_processor_are_as_the_table_says(table: Table):
    processor = product_processor()
    if not processor:
        pytest.skip("the table says nothing of this kind of processor")
    here = list(found_products(processor))
    assert len(here) == len(table.products) > 40
    assert capability_check._product_differences(table.products, here, processor) == []


def test_every_entry_has_a_probe(table: Table):
    forms = {(one.kernel, one.weights, one.activations, one.stored, one.when) for one in FORMS}
    assert len(forms) == len(FORMS)
    assert {(one.kernel, one.weights, one.activations, one.stored, one.when) for one in table.products} <= forms


def test_which_types_saturate(table: Table):
    cut = {(one.kernel, one.activations, one.stored) for one in table.products if one.saturates}
    kernels = {one for one in cut if " -> " not in one[0] and one[0] != "ConvInteger"}
    assert {one[1:] for one in kernels} == {("uint8", "int8"), ("float32", "int8")}
    assert ("ConvInteger", "int8", "uint8") in cut
    # Layers as models write them: signed activations become unsigned ones before a kernel is chosen.
    assert {one[1:] for one in cut if " -> " in one[0]} == {("uint8", "int8"), ("int8", "int8")}
    assert all("vnni" not in one.saturates for one in table.products)


def test_a_probe_tells_a_wrong_sum():
    form = next(one for one in FORMS if one.kernel == "com.microsoft.QGemm")
    probe = form.builds[0]()
    assert not probe.saturates() or product_processor() != "vnni"
    assert dataclasses.replace(probe, exact=probe.exact / 2).saturates()


def test_sums_that_differ_are_told(table: Table):
    exact = next(one for one in table.products if one.when == ("depthwise",) and not one.saturates)
    other = dataclasses.replace(exact, saturates=("avx2",))
    told = f"{exact.kernel} ({exact.activations} by {exact.stored}, depthwise): "
    (line,) = capability_check._product_differences([exact], [other], "avx2")
    assert line == f"{told}sums of two products saturate on this processor (avx2), sums are exact by the table"
    (line,) = capability_check._product_differences([], [exact], "avx2")
    assert line.endswith("sums are exact on this processor (avx2), nothing is known by the table")
    assert capability_check._product_differences([other], [other], "avx2") == []


def test_the_page_says_on_which_processor():
    check = TableCheck("onnxruntime-cpu", "1.31.1", "1.31.1", processor="avx512", products=42)
    ((_, line),) = cli_pages.probe_lines([check])
    assert line.endswith("; 42 products of bytes on avx512")
