"""The table of ONNX Runtime's CPU provider against the runtime that is installed, and what is said when they differ."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import struct
from collections.abc import Mapping

import onnx_ir as ir
import pytest

from qgraph import capabilities, cli_pages
from qgraph.analysis.kernel_support import unsupported
from qgraph.capabilities import Entry, Table, Types
from qgraph.runtime import capability_check, importer_probes, kernel_probes, kernel_registry, probe_worker
from qgraph.runtime.capability_check import TableCheck, check_table, registry_differences
from qgraph.runtime.fusion_probes import FORMS, found_fusions
from qgraph.runtime.kernel_probes import outcomes, probes
from qgraph.runtime.kernel_registry import registry_entries, type_word

CPU = "onnxruntime-cpu"
_SOME = ("Attention", "Det", "If", "MaxPool", "OneHot", "Pow", "Relu")


@pytest.fixture(scope="module")
def table() -> Table:
    return capabilities.table(CPU)


@pytest.fixture
def installed(table: Table) -> Table:
    """Return the table if the installed release is the one that it was taken of."""
    import onnxruntime

    if onnxruntime.__version__ != table.version:
        pytest.skip(f"the table is of ONNX Runtime {table.version}, not of {onnxruntime.__version__}")
    return table


def altered(table: Table, operators: Mapping[str, tuple[Entry, ...]]) -> Table:
    return dataclasses.replace(table, operators={**table.operators, **operators})


def test_the_table_has_every_kernel_of_the_registry_and_no_other(installed: Table):
    kernels = registry_entries()
    assert registry_differences(installed, kernels) == []
    wrong = altered(installed, {"Abs": (Entry("Abs", 6, 12, Types({0: ("int8",)}), source="registry"),)})
    lacks, has = registry_differences(wrong, kernels)
    assert lacks.startswith("the runtime has a kernel that the table lacks: Abs 6.. (0: float32|")
    assert has == "the runtime lacks a kernel that the table has: Abs 6..12 (0: int8) => ()"


def test_an_entry_holds_until_the_next_version_of_its_operator(table: Table):
    assert [(one.since, one.until) for one in table.operators["Add"]] == [(7, 13), (14, None)]
    assert [(one.since, one.until) for one in table.operators["Cast"]] == [(6, 23), (24, None)]


def test_type_names_of_the_runtime_become_those_of_tables():
    assert type_word("tensor(double)") == "float64"
    assert type_word("seq(tensor(float))") == "seq(float32)"
    assert type_word("sparse_tensor(float)") == "sparse(float32)"
    assert type_word("map(int64,tensor(float))") == "map(int64,float32)"


def test_models_of_every_type_load_where_the_table_has_a_kernel_and_nowhere_else(installed: Table):
    names = ("Clip", "Conv", "Gather", "HardSwish", "MatMul", "Relu", "Resize", "com.microsoft.QLinearSigmoid")
    every = [one for one in probes(installed) if one.name in names]
    results = list(outcomes(one.model for one in every))
    assert {one.name for one in every} == set(names)
    assert sum(result.state == "ran" for result in results) > 25
    assert sum(result.state == "none" for result in results) > 8
    for probe, result in zip(every, results, strict=True):
        if result.state != "not built":
            assert (result.state == "none") == (probe.refusal(installed) is not None), (probe, result)
    wrong = altered(installed, {"Relu": (Entry("Relu", inputs=Types({0: ("int16", "float32")}), source="registry"),)})
    told = capability_check._probe_differences(wrong, every, results)
    texts = "\n".join(told)
    assert "the table takes Relu of opset 26 with int16, the runtime does not: " in texts
    assert "the runtime takes Relu of opset 26 with int8, the table does not: Relu: input 0 is int8" in texts


def test_a_model_that_kills_the_runtime_is_not_built_and_the_next_one_is_probed(monkeypatch: pytest.MonkeyPatch):
    killer = kernel_probes.probe_model("com.microsoft", "QLinearLeakyRelu", 21, ["int8", "float32"], {"alpha": 1.0})
    fine = kernel_probes.probe_model("", "Relu", 21, ["float32"], {})
    first, second = outcomes([killer.model, fine.model])
    assert first.state == "not built"
    assert second.state == "ran"


def test_the_worker_answers_line_by_line():
    relu, gelu = (
        ir.to_proto(kernel_probes.probe_model("", name, 21, [word], {}).model).SerializeToString()
        for name, word in (("Relu", "float32"), ("Gelu", "float64"))
    )
    requests = io.BytesIO(b"".join(struct.pack("<I", len(one)) + one for one in (relu, gelu, b"nonsense")))
    answers = io.StringIO()
    probe_worker.serve(requests, answers)
    lines = answers.getvalue().splitlines()
    assert lines[:2] == ["loaded", "ran"]
    assert lines[2].startswith("none ")
    assert lines[3].startswith("refused ")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.pattern} {'; '.join(form.when)}")
def test_what_the_runtime_makes_of_several_nodes(installed: Table, form):
    (here,) = found_fusions([form])
    assert here in installed.fusions


def test_every_fused_form_of_the_table_has_a_probe(table: Table):
    assert [(one.pattern, one.when) for one in table.fusions] == [(form.pattern, form.when) for form in FORMS]
    assert len(set(FORMS)) == len(FORMS)


def test_fused_forms_that_differ_are_told(table: Table):
    one, other = [form for form in table.fusions if form.kernel == "com.microsoft.MatMulNBits"][:2]
    changed = dataclasses.replace(one, kernel="")
    assert capability_check._fusion_differences([changed], [one, other]) == [
        f"{one.pattern} ({one.when[0]}): com.microsoft.MatMulNBits here, left as it is by the table",
        f"the table does not know what becomes of {other.pattern} ({other.when[0]}): here com.microsoft.MatMulNBits",
    ]
    assert capability_check._fusion_differences([one], []) == [
        f"no probe shows what becomes of {one.pattern} ({one.when[0]})"
    ]


def test_the_importer_of_tvm_takes_what_its_table_says_and_no_more(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tvm", reason="Apache TVM is not installed")
    table = capabilities.table("tvm")
    some = [probe for name in _SOME for probe in importer_probes.examples(name)]
    monkeypatch.setattr(capability_check, "examples", lambda: some)
    check = check_table(table)
    if check.installed == table.version:
        assert check.agrees, check.differences
    assert check.probes["loaded"] > 10
    assert check.probes["none"] > 5
    operators = {**table.operators, "Det": (Entry("Det"),), "Bogus": (Entry("Bogus"),)}
    del operators["Relu"]
    told = check_table(dataclasses.replace(table, operators=operators)).differences
    assert "the table takes Det of opset 22 with float32, the runtime does not: " in "\n".join(told)
    assert "the runtime takes Relu of opset 14 with float32, the table does not: Apache TVM has no Relu" in told
    assert "the importer lacks a converter that the table has: Bogus" in told
    ((name, text), *_) = cli_pages.probe_lines([check])
    assert (name, "158 operators have a converter; ONNX's examples of operators" in text) == ("tvm", True)


def test_examples_have_constants_behind_their_first_input():
    found = list(importer_probes.examples("Clip"))
    assert {probe.name for probe in found} == {"Clip"}
    for probe in found:
        assert [value.name for value in probe.model.graph.inputs] == ["x"]
        assert len(probe.model.graph.initializers) == sum(bool(word) for word in probe.types) - 1


def test_without_tvm_one_line_says_so(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    (line,) = cli_pages.probe_lines([check_table(capabilities.table("tvm"))])
    assert line == ("tvm", "not checked: TVM is not installed: pip install 'qgraph-compiler[tvm]'")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"runtime": "TVM"}, "TVM tells nothing of its kernels"),
        ({"provider": "CUDAExecutionProvider"}, "CUDAExecutionProvider is not installed here"),
    ],
)
def test_what_cannot_be_checked_here_says_so(table: Table, changed: dict[str, str], reason: str):
    check = check_table(dataclasses.replace(table, **changed))
    assert reason in check.unchecked
    assert check.agrees


def test_without_the_runtime_one_line_says_so(table: Table, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capability_check, "installed_providers", list)
    (line,) = cli_pages.probe_lines([check_table(table)])
    assert line == (CPU, "not checked: ONNX Runtime is not installed: pip install 'qgraph-compiler[cpu]'")


def test_another_release_is_named():
    check = TableCheck(
        CPU, "1.31.1", "1.24.0", entries=3, probes={"ran": 1}, fusions=2, differences=tuple(f"d{i}" for i in range(30))
    )
    lines = cli_pages.probe_lines([check])
    assert lines[0][1].startswith("30 differences (of 1.31.1; 1.24.0 is installed): 3 kernels of the registry; ")
    assert lines[1] == ("", "d0")
    assert lines[-1] == ("", "and 10 more: --json has them all")


def test_blocks_and_bits_without_a_kernel(table: Table):
    def reasons(bits: int, block: int) -> list[str]:
        text = f"y = com.microsoft.MatMulNBits <K=32, N=8, bits={bits}, block_size={block}> (x, b, s)"
        head = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
        graph = f"g (float[1,32] x, uint8[8,1,16] b, float[8] s) => (float[1,8] y) {{ {text} }}"
        return [one.reason for one in unsupported(ir.from_onnx_text(f"{head} {graph}"), table)]

    assert reasons(4, 32) == []
    assert "attribute bits is 3, and ONNX Runtime's CPUExecutionProvider takes none, 2, 4, 8" in reasons(3, 32)[0]
    assert "attribute block_size is 48" in reasons(4, 48)[0]


def test_a_registry_that_would_kill_the_process_is_not_asked(table: Table, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        kernel_registry, "installed_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(kernel_registry, "_ASK", "import os; os.abort()")
    kernel_registry._require_registry.cache_clear()
    try:
        assert "built with CUDAExecutionProvider, and not all of them load" in check_table(table).unchecked
    finally:
        kernel_registry._require_registry.cache_clear()


def test_of_other_providers_the_registry_is_compared(table: Table, monkeypatch: pytest.MonkeyPatch):
    cuda = capabilities.table("onnxruntime-cuda")
    kernels = [entry for entries in cuda.operators.values() for entry in entries]
    monkeypatch.setattr(capability_check, "installed_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(capability_check, "registry_entries", lambda provider: kernels[1:])
    check = check_table(cuda)
    assert check.differences == (
        f"the runtime lacks a kernel that the table has: {capability_check._kernel_text(kernels[0])}",
    )
    ((_, line), _) = cli_pages.probe_lines([check])
    assert line.endswith(f": {len(kernels) - 1} kernels of the registry")
