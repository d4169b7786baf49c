"""The house: who may import whom, read off the sources."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = {"qgraph": "qgraph", "passes": "qgraph.passes", "targets": "qgraph.targets", "models": "qgraph.models"}

LAYERS = (
    ("errors", "wire", "lazy_tensors"),
    ("user_code", "manifest"),
    ("cache",),
    ("spec", "registry", "numerics", "capabilities", "onnx_file", "signatures"),
    ("ir", "safetensors", "work_folder"),
    ("pipeline", "runtime.placement"),
    ("targets.base",),
    ("target_options",),
    ("feeds", "tokens"),
    ("token_feeds",),
    ("sample_images", "sample_texts"),
    ("sample_arrays",),
    ("samples",),
    ("runtime.session", "runtime.metrics"),
    ("analysis",),
    ("codegen", "coreml"),
    ("passes",),
    ("runtime",),
    ("targets",),
    ("report",),
    ("artifact",),
    ("bounds", "plan", "building", "loading", "stored_states"),
    ("sharing", "manifest_facts"),
    ("proof", "beginnings"),
    ("stages",),
    ("search_edits", "search_precision", "search_ranking", "search_workshop"),
    ("search_candidates", "search_executors"),
    ("search_trials",),
    ("search_moves",),
    ("search_budget", "search_climb"),
    ("search",),
    ("compiler",),
    ("catalog", "evaluation", "float_form"),
    ("verbs", "doctor", "comparison"),
    ("build_recipe",),
    ("build_workers",),
    ("builder",),
    (
        "cli",
        "cli_artifact",
        "cli_build",
        "cli_catalog",
        "cli_commands",
        "cli_compare",
        "cli_compile",
        "cli_display",
        "cli_language",
        "cli_options",
        "cli_pages",
        "__main__",
    ),
)
"""From the bottom up: a module imports from layers below its own, and from its own component."""
HEAVY = {"onnxruntime", "torch", "tvm", "coremltools", "tokenizers", "PIL", "sklearn", "ray"}
ARRAYS_ONLY = {"numpy", "scipy", "ml_dtypes"}


def sources() -> dict[str, ast.Module]:
    """Return module name -> parsed source of everything that is installed."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(part for part in parts if part != "__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


SOURCES = sources()


def imports(tree: ast.AST, *, at_load: bool = False) -> Iterator[str]:
    """Yield the modules that `tree` imports, but for type checkers; `at_load` leaves out those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in SOURCES else str(node.module) for name in inner)
        else:
            yield from imports(node, at_load=at_load)


def place(module: str) -> tuple[int, str]:
    """Return the layer and the component of a module of ours; the longest name that fits counts."""
    name = module.removeprefix("qgraph.")
    fits = [
        (len(component), layer, component)
        for layer, components in enumerate(LAYERS)
        for component in components
        if name == component or name.startswith(f"{component}.")
    ]
    assert fits, f"{module} has no place in LAYERS"
    _, layer, component = max(fits)
    return layer, component


OURS = [name for name in SOURCES if name != "qgraph" and not name.startswith("qgraph.models")]


@pytest.mark.parametrize("module", OURS)
def test_imports_go_one_way(module: str):
    layer, component = place(module)
    for other in imports(SOURCES[module]):
        if not other.startswith("qgraph."):
            continue
        if other == "qgraph.models.decoder" and layer == len(LAYERS) - 1:
            continue
        assert not other.startswith("qgraph.models"), f"{module} imports {other}"
        above, of = place(other)
        assert above < layer or of == component or (above == layer and layer == len(LAYERS) - 1), (
            f"{module} imports {other}, which is not below it"
        )


@pytest.mark.parametrize("module", [name for name in OURS if name.startswith("qgraph.passes.")])
def test_passes_do_not_import_one_another(module: str):
    for other in imports(SOURCES[module]):
        shared = other.rpartition(".")[2].startswith("_")
        assert not other.startswith("qgraph.passes") or shared, f"{module} imports {other}"


@pytest.mark.parametrize("module", [name for name in OURS if name.startswith("qgraph.numerics")])
def test_numerics_know_arrays_only(module: str):
    for other in imports(SOURCES[module]):
        top = other.partition(".")[0]
        assert other.startswith(("qgraph.numerics", "qgraph.errors")) or top in ARRAYS_ONLY | sys.stdlib_module_names, (
            f"{module} imports {other}"
        )
        assert not other.startswith("scipy") or other.startswith("scipy.linalg"), f"{module} imports {other}"


@pytest.mark.parametrize("module", [name for name in OURS if name.startswith("qgraph.capabilities")])
def test_tables_know_nothing_of_graphs(module: str):
    for other in imports(SOURCES[module]):
        ours = other.startswith(("qgraph.capabilities", "qgraph.errors"))
        assert ours or other.partition(".")[0] in sys.stdlib_module_names, f"{module} imports {other}"


@pytest.mark.parametrize("module", SOURCES)
def test_heavy_packages_are_imported_where_they_are_needed(module: str):
    if module.startswith("qgraph.models.train"):
        return
    heavy = {other for other in imports(SOURCES[module], at_load=True) if other.partition(".")[0] in HEAVY}
    assert not heavy, f"{module} imports {heavy} when it is loaded"


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("qgraph.models")])
def test_reference_models_need_only_the_graph(module: str):
    for other in imports(SOURCES[module]):
        allowed = ("qgraph.models", "qgraph.errors", "qgraph.ir", "qgraph.onnx_file", "qgraph.safetensors")
        assert not other.startswith("qgraph.") or other.startswith(allowed), f"{module} imports {other}"
