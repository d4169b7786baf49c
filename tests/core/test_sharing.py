"""What compilations share, in memory and on disk: never anything but what they would have made themselves."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qgraph
import qgraph.ir
from qgraph import sharing as sharing_module
from qgraph.analysis.calibration import calibrate
from qgraph.cache import Cache, key_of
from qgraph.errors import UserError
from qgraph.passes.qdq import Qdq
from qgraph.passes.sparsify import Sparsify
from qgraph.pipeline import Context, Pipeline, Report
from qgraph.sharing import BusyError, Line, Sharing
from qgraph.stored_states import State, read_outputs, read_state, write_outputs, write_state

KEY = key_of("a key")
PASSES = "fold-constants,sparsify{pattern=2:4,min_elements=64},qdq"


@pytest.fixture
def all_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every state, however little time it took."""
    monkeypatch.setattr(sharing_module, "_WORTH_COPYING", 0.0)
    monkeypatch.setattr(sharing_module, "_WORTH_WRITING", 0.0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the two passes that take long, as they run."""
    ran: list[str] = []
    for cls in (Qdq, Sparsify):
        apply = cls.apply

        def counted(self: Any, model: Any, context: Any, apply: Callable[..., Report] = apply) -> Report:
            ran.append(self.name)
            return apply(self, model, context)

        monkeypatch.setattr(cls, "apply", counted)
    return ran


def feeds(network: Path) -> list[dict[str, np.ndarray]]:
    return [{"image": one[None]} for one in np.load(network / "samples.npz")["image"][:8]]


def hashes(folder: Path) -> dict[str, str]:
    timed = ("bench.json", "report.html")
    found = sorted(path for path in folder.iterdir() if path.name not in timed)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def compiled(network: Path, folder: Path, passes: str = PASSES, **options: Any) -> dict[str, str]:
    context = options.pop("context", Context(threads=1))
    calibration = options.pop("calibration", network / "samples.npz")
    artifact = qgraph.compile(
        network / "net.onnx", "cpu-fp32", passes=passes, calibration=calibration, output=folder, context=context,
        **options,
    )  # fmt: skip
    return hashes(artifact.path)


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_is_worth_it")
def test_a_shared_beginning_runs_once_and_gives_the_same_bytes(network: Path, tmp_path: Path, runs: list[str]) -> None:
    alone = [compiled(network, tmp_path / f"a{i}", f"{PASSES}{more}") for i, more in enumerate(("", "{weights=int4}"))]
    runs.clear()
    shared = Sharing()
    found = [
        compiled(network, tmp_path / f"b{i}", f"{PASSES}{more}", sharing=shared)
        for i, more in enumerate(("", "{weights=int4}"))
    ]
    assert runs == ["sparsify", "qdq", "qdq"]
    assert found == alone


@pytest.mark.usefixtures("all_is_worth_it")
def test_another_compilation_finds_everything_on_disk(network: Path, tmp_path: Path, runs: list[str]) -> None:
    alone = compiled(network, tmp_path / "alone")
    first = compiled(network, tmp_path / "first", cache=tmp_path / "cache")
    runs.clear()
    second = compiled(network, tmp_path / "second", cache=tmp_path / "cache")
    assert runs == []
    assert alone == first == second


@pytest.mark.usefixtures("all_is_worth_it")
@pytest.mark.parametrize(
    "change",
    [
        {"context": Context(threads=1, seed=1)},
        {"context": Context(threads=1, calibration_memory=1 << 20)},
        {"calibration": "others"},
        {"shapes": {"image": (1, 4, 8, 8)}},
        {"passes": PASSES.replace("2:4", "unstructured")},
    ],
    ids=["seed", "memory", "samples", "shapes", "option"],
)
def test_what_results_depend_on_is_in_the_key(
    network: Path, tmp_path: Path, runs: list[str], change: dict[str, Any]
) -> None:
    compiled(network, tmp_path / "first", cache=tmp_path / "cache")
    runs.clear()
    if change.get("calibration"):
        change = {"calibration": feeds(network)}
    compiled(network, tmp_path / "second", cache=tmp_path / "cache", **change)
    assert runs == ["sparsify", "qdq"]


def test_the_source_and_the_versions_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, facts = Sharing(), {"sha256": "0"}
    root = shared.root(facts, {}, Context())
    assert root == Sharing().root(facts, {}, Context())
    assert root != shared.root({"sha256": "1"}, {}, Context())
    assert root != shared.root(facts, {"image": [1]}, Context())
    for change in ({"seed": 1}, {"threads": 1}, {"calibration_memory": 1}, {"opset": 20}):
        assert root != shared.root(facts, {}, Context(**change)), change
    monkeypatch.setattr(sharing_module, "_versions", lambda: ("other",))
    assert root != shared.root(facts, {}, Context())


@pytest.mark.parametrize("text", ["rewrite{{rules={}:RULES}}", "onnx-ir{{of={}:Mine}}"])
def test_the_code_that_a_pass_names_is_in_the_key(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))

    def key(module: str) -> str | None:
        sharing_module._code.cache_clear()
        importlib.invalidate_caches()
        return sharing_module.keys_behind("root", Pipeline.parse(text.format(module)).passes)[0]

    (tmp_path / "user_rules.py").write_text("RULES = Mine = 1")
    first = key("user_rules")
    assert first == key("user_rules")
    (tmp_path / "user_rules.py").write_text("RULES = Mine = 2")
    assert first != key("user_rules")
    assert key("no.such.module") is not None, "what is wrong with it is for the pass to tell"


def test_the_tables_of_capabilities_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self) or b"")
    sharing_module._own_code()
    names = {path.name for path in read}
    assert {"onnxruntime-cpu.toml", "qdq.py", "integer.py", "compiler.py", "calibration.py"} <= names
    assert len(read) == len(set(read))


def test_without_samples_the_one_who_needs_them_is_named(network: Path) -> None:
    shared = Line(qgraph.load(network / "net.onnx"), Context(), Sharing(), "root")
    with pytest.raises(UserError, match="static quantization needs calibration data"):
        shared.run(Pipeline.parse("qdq"))


@pytest.mark.usefixtures("all_is_worth_it")
def test_who_goes_on_from_there_has_what_the_passes_have_left(network: Path) -> None:
    shared, context = Sharing(), Context(calibration=feeds(network))
    lines = [Line(qgraph.load(network / "net.onnx"), context, shared, "root") for _ in range(2)]
    reports = [line.run(Pipeline.parse("sparsify{min_elements=64}")) for line in lines]
    assert reports[0].seconds == reports[1].seconds, "the second was not run"
    assert lines[0].model is not lines[1].model
    for line in lines:
        assert [type(one).__name__ for one in line.context.promises] == ["ZerosStay"]
        assert line.context.reference is not None
    assert context.promises == [], "the context given is not changed"


@pytest.mark.usefixtures("all_is_worth_it")
def test_a_pass_without_a_text_shares_nothing_behind_it(network: Path) -> None:
    shared = Sharing()
    for _ in range(2):
        line = Line(qgraph.load(network / "net.onnx"), Context(), shared, "root")
        rules = type("Rules", (), {"apply_to_model": lambda self, model: 0})()
        with pytest.raises(UserError, match="not an onnxscript"):
            line.run(Pipeline.parse("remove-unused") + Pipeline([rules]) + Pipeline.parse("remove-identity"))
    assert len(shared._states) == 1


def test_ranges_of_equal_models_are_taken_once(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, calls = Sharing(), []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return calibrate(*arguments)

    monkeypatch.setattr(sharing_module, "_BY_NAME", (counted,))
    model = qgraph.load(network / "net.onnx")
    other = model.clone()
    weight = other.graph.initializers["inner"]
    weight.const_value = qgraph.ir.ir.tensor(weight.const_value.numpy() * 2)
    found = []
    for one in (model, model.clone(), other):
        context = dataclasses.replace(
            Line(one, Context(calibration=feeds(network)), shared, "root").context, _analyses={}
        )
        found.append(context.analyse(counted, one, ("image", "scores")))
    assert len(calls) == 2
    assert found[0] is found[1]
    assert found[2]["scores"].high > found[0]["scores"].high


# --- the cache --------------------------------------------------------------------------------------------------------


def kept(cache: Cache, text: str = "content", key: str = KEY) -> bool:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "file.txt").write_text(text)
        return {"n": 1}

    return cache.keep(key, write)


def test_an_entry_is_read_as_it_was_written(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "cache")
    assert cache.find(KEY) is None
    assert kept(cache)
    folder, facts = Cache(tmp_path / "deep" / "cache").find(KEY) or pytest.fail("not found")
    assert ((folder / "file.txt").read_text(), facts) == ("content", {"n": 1})
    assert kept(cache, "never written"), "who comes second has it too"
    assert (folder / "file.txt").read_text() == "content"
    assert not cache.keep(key_of("x"), lambda folder: None)
    assert not list(cache.folder.glob(".*.tmp"))


@pytest.mark.parametrize("victim", ["file.txt", "entry.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "more"])
def test_a_damaged_entry_is_dropped_with_a_line(tmp_path: Path, victim: str, damage: str) -> None:
    told: list[str] = []
    cache = Cache(tmp_path, tell=told.append)
    kept(cache)
    path = tmp_path / KEY / victim
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "remove":
        path.unlink()
    else:
        (tmp_path / KEY / "another.txt").write_text("")
    assert cache.find(KEY) is None
    assert len(told) == 1
    assert "damaged and made anew" in told[0]
    assert "\n" not in told[0]
    assert not (tmp_path / KEY).exists()
    assert kept(cache)
    assert cache.find(KEY)


def test_what_is_no_cache_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file: name a folder"):
        Cache(tmp_path / "file")
    with pytest.raises(UserError, match="lies under a file"):
        Cache(tmp_path / "file" / "inner")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"holds thesis\.txt"):
        Cache(tmp_path / "mine")
    Cache(tmp_path / "cache")
    (tmp_path / "cache" / "CACHE").write_text("qgraph cache, format 99\n")
    with pytest.raises(UserError, match=r"in another format \(qgraph cache, format 99\)"):
        Cache(tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be written"):
        Cache(tmp_path / "cache")


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), UserError("x: No space left on device")])
def test_a_full_disk_costs_the_entry_and_not_the_work(fault: Exception, tmp_path: Path) -> None:
    told: list[str] = []

    def full(folder: Path) -> dict[str, Any]:
        raise fault

    cache = Cache(tmp_path, tell=told.append)
    assert not cache.keep(KEY, full)
    assert "No space left" in told[0]
    assert not list(tmp_path.glob(".*.tmp"))


def test_beyond_its_size_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    keys = [key_of(i) for i in range(4)]
    for age, key in zip((9e4, 8e4, 7e4), keys, strict=False):
        kept(cache, "x" * 100, key)
        os.utime(tmp_path / key, (0, (tmp_path / key).stat().st_mtime - age))
    cache.find(keys[0])
    kept(Cache(tmp_path, limit=250), "x" * 100, keys[3])
    assert [(tmp_path / key).is_dir() for key in keys] == [True, False, False, True]


def test_processes_that_make_the_same_at_once_all_succeed(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from qgraph.cache import Cache, key_of\n"
        "cache = Cache(sys.argv[1])\n"
        "for i in range(30):\n"
        "    def write(folder):\n"
        "        for j in range(3): (folder / f'{j}').write_bytes(bytes([i]) * 20000)\n"
        "        return {}\n"
        "    assert cache.keep(key_of(i), write)\n"
        "    folder, _ = cache.find(key_of(i))\n"
        "    assert (folder / '2').read_bytes() == bytes([i]) * 20000\n"
    )

    def run(_: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-c", script, str(tmp_path / "cache")]
        return subprocess.run(command, capture_output=True, text=True)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        done = list(pool.map(run, range(3)))
    assert [(one.returncode, one.stderr) for one in done] == [(0, "")] * 3
    assert len(list((tmp_path / "cache").glob("[0-9a-f]*"))) == 30
    assert not list((tmp_path / "cache").glob(".*.tmp"))


def test_a_claim_holds_against_other_processes_and_ends_with_them(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    script = (
        "import sys\nfrom qgraph.cache import Cache\ncache = Cache(sys.argv[1])\n"
        "with cache.claim('00' * 32) as one, cache.claim('01' * 32) as other: print(one, other)\n"
    )

    def ask() -> str:
        command = [sys.executable, "-c", script, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with cache.claim("00" * 32) as had:
        assert had
        assert ask() == "False True"
    assert ask() == "True True"


@pytest.mark.usefixtures("all_is_worth_it")
def test_who_is_busy_with_a_pass_keeps_others_from_it(network: Path, tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    context = Context(calibration=feeds(network))

    def line() -> Line:
        return Line(qgraph.load(network / "net.onnx"), context, Sharing(cache, claims=True, memory=False), "root")

    first = line()
    first.run(Pipeline.parse("fold-constants"))
    assert first._key is not None
    (key,) = sharing_module.keys_behind(first._key, Pipeline.parse("qdq").passes)
    assert key is not None
    cache.keep(key, lambda folder: {})  # by another process, just now: what is there is not looked into yet
    with pytest.raises(BusyError), first._claimed([key]):
        pass
    cache.drop(key)
    report = line().run(Pipeline.parse("fold-constants,qdq"))
    assert [one.name for one in report.parts] == ["fold-constants", "qdq"]
    again = line().run(Pipeline.parse("fold-constants,qdq"))
    assert again.seconds == report.seconds, "it was taken from the cache"


# --- states as files --------------------------------------------------------------------------------------------------


def test_a_state_is_read_as_it_was(network: Path, tmp_path: Path) -> None:
    model = qgraph.load(network / "net.onnx")
    context = Context(calibration=feeds(network))
    report = Pipeline.parse("fold-constants,sparsify{min_elements=64}").run(model, context=context)
    assert context.reference is not None
    assert context.promises
    facts = write_state(State.of(model, context, report.parts), tmp_path)
    assert facts is not None
    found = read_state(tmp_path, facts)
    parts = [dataclasses.replace(one, notes=tuple(one.notes), skipped=tuple(one.skipped)) for one in report.parts]
    assert list(found.reports) == parts
    assert [type(one) for one in found.promises] == [type(one) for one in context.promises]
    for path, one in (("a", model), ("b", found.model)):
        qgraph.save(one, tmp_path / f"{path}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert found.reference is not None
    assert len(found.reference.graph) == len(context.reference.graph)


def test_a_promise_of_somebody_else_s_is_not_stored(network: Path, tmp_path: Path) -> None:
    model = qgraph.load(network / "net.onnx")
    assert write_state(State(model, (), None, (lambda model: None,)), tmp_path) is None
    with pytest.raises(ValueError, match="none of qgraph's"):
        read_state(tmp_path, {"reports": [], "reference": False, "promises": ["os:abort"]} | _written(model, tmp_path))


def _written(model: Any, folder: Path) -> dict[str, Any]:
    qgraph.save(model, folder / "model.onnx")
    return {}


def test_outputs_are_read_as_they_were_and_text_is_not_kept(tmp_path: Path) -> None:
    outputs = [[np.arange(3, dtype=np.float16), np.array(1)], [np.zeros((0, 2), bool), np.array([2.5])]]
    facts = write_outputs(outputs, tmp_path)
    assert facts is not None
    for sample, again in zip(outputs, read_outputs(tmp_path, facts), strict=True):
        for one, other in zip(sample, again, strict=True):
            np.testing.assert_array_equal(one, other, strict=True)
    assert write_outputs([[np.array(["a"], dtype=object)]], tmp_path) is None
