"""Every verb as a user types it: what it prints, where, and with which status."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph import cli, doctor, registry
from qgraph.runtime import capability_check
from qgraph.runtime.capability_check import TableCheck

Run = Callable[..., subprocess.CompletedProcess[str]]
INT8 = ("--passes", "dynamic-int8")
"""The model is so small that the target would leave it in float."""
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "rich", "scipy", "torch", "networkx")


def test_help_and_version_load_nothing_heavy():
    for flag in ("--help", "--version"):
        code = (
            "import sys; from qgraph.cli import main; status = main([sys.argv[1]]);"
            f"print([name for name in {HEAVY} if name in sys.modules], status)"
        )
        done = subprocess.run([sys.executable, "-P", "-c", code, flag], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[] 0"


def test_version_answers_at_once():
    # Processor time, since the machine may be busy: 0.1 s here, where the promise is 0.3 s.
    def spent() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-P", "-m", "qgraph", "--version"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(spent() for _ in range(3)) < 0.3


@pytest.mark.parametrize(
    "verb", ["compile", "run", "verify", "bench", "inspect", "diff", "targets", "passes", "doctor"]
)
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str):
    assert cli.main([verb, "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"Usage: qgraph {verb} ")
    assert "--json" in shown.out
    assert shown.err == ""


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2
    assert "Usage: qgraph" in capsys.readouterr().err


def test_compile_says_what_it_did(qgraph: Run, work: Path):
    done = qgraph("compile", "model.onnx", "--target", "cpu-int8", "--calib", "calib.npz", *INT8)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    stages = [line.split()[0] for line in done.stderr.splitlines() if re.match(r"[a-z]", line)]
    assert stages[:2] == ["load", "prepare"]
    assert {"lower", "verify", "bench"} <= set(stages)
    assert re.search(r"^  size +\S+ kB +\S+ kB +\S+x smaller", done.stderr, re.MULTILINE)
    assert re.search(r"^  latency ", done.stderr, re.MULTILINE)
    assert re.search(r"^  accuracy +100.00 %", done.stderr, re.MULTILINE)
    assert done.stderr.splitlines()[-1].startswith(
        "model.cpu-int8/   bench.json  manifest.json  model.onnx  recipe.toml"
    )
    assert "\x1b" not in done.stderr
    assert (work / "model.cpu-int8" / "manifest.json").is_file()


def test_json_is_one_document_and_quiet_is_quiet(qgraph: Run, work: Path):
    done = qgraph("compile", "model.onnx", "-t", "cpu-int8", "--calib", "calib.npz", "--json", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["verified"] is True
    assert document["manifest"] == json.loads((work / "model.cpu-int8" / "manifest.json").read_text())
    assert document["bench"] == json.loads((work / "model.cpu-int8" / "bench.json").read_text())


def test_outside_the_tolerance_keeps_the_artifact(qgraph: Run, work: Path):
    options = ("--calib", "calib.npz", "--tolerance", "sqnr=200", "--json", "--passes", "to-fp16")
    done = qgraph("compile", "model.onnx", "-t", "cpu-int8", *options)
    assert done.returncode == 3
    assert json.loads(done.stdout)["verified"] is False
    assert done.stderr.splitlines()[-1].startswith("error: model.cpu-int8 is outside the tolerance: SQNR is ")
    assert "NOT VERIFIED" in done.stderr
    assert json.loads((work / "model.cpu-int8" / "manifest.json").read_text())["verified"] is False
    again = qgraph("verify", "model.cpu-int8", "--data", "calib.npz", "--json")
    assert again.returncode == 3
    assert json.loads(again.stdout)["samples"] == 40
    assert qgraph("verify", "model.cpu-int8", "--data", "calib.npz", "--tolerance", "sqnr=5").returncode == 0


def test_the_same_input_gives_the_same_bytes(qgraph: Run, work: Path):
    for output in ("one", "two"):
        done = qgraph("compile", "model.onnx", "-t", "cpu-int8", "--calib", "calib.npz", "-o", output, "-q")
        assert done.returncode == 0, done.stderr
    for name in ("model.onnx", "manifest.json", "recipe.toml"):
        assert (work / "one" / name).read_bytes() == (work / "two" / name).read_bytes()


def test_the_recipe_of_an_artifact_repeats_it(qgraph: Run, work: Path, artifact: Path):
    options = ("--calib", "calib.npz", "--recipe", artifact / "recipe.toml", "-o", "again", "-q")
    done = qgraph("compile", "model.onnx", "-t", "cpu-int8", *options)
    assert done.returncode == 0, done.stderr
    assert (work / "again" / "model.onnx").read_bytes() == (artifact / "model.onnx").read_bytes()


def test_labelled_data_to_verify_on(qgraph: Run, work: Path):
    arrays = dict(np.load(work / "calib.npz"))
    np.savez(work / "held.npz", data=arrays["x"], truth=(arrays["labels"] + 1) % 10)
    np.savez(work / "calib.npz", data=arrays["x"])
    options = ("--calib", "calib.npz", "--verify-data", "held.npz", "--map", "data=x", "--labels", "truth", "--json")
    done = qgraph("compile", "model.onnx", "-t", "cpu-int8", *options)
    assert done.returncode == 0, done.stderr
    verification = json.loads(done.stdout)["manifest"]["verification"]
    assert verification["labelled"] == 40
    assert verification["accuracy_before"] == 0


def test_run_writes_the_outputs(qgraph: Run, work: Path, artifact: Path):
    done = qgraph("run", artifact, "--input", "calib.npz", "-o", "y.npz", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["outputs"] == [{"name": "scores", "dtype": "float32", "shape": [40, 10]}]
    scores = np.load(work / "y.npz")["scores"]
    labels = np.load(work / "calib.npz")["labels"]
    assert np.mean(np.argmax(scores, axis=1) == labels) > 0.9
    assert qgraph("run", artifact, "-i", "calib.npz", "-o", "y.npz", "--force", "-q").returncode == 0


def test_bench_compares_with_the_source(qgraph: Run, work: Path, artifact: Path):
    done = qgraph(
        "bench", artifact, "--against", "model.onnx", "--seconds", "0.2", "--shape", "x=4,64", "--json", "-j1"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [one["name"] for one in document["candidates"]] == ["before", "after"]
    assert document["batch"] == "4 x 64"
    assert document["threads"] == 1
    assert document["sizes"]["before"] == (work / "model.onnx").stat().st_size
    assert document["sizes"]["after"] < 0.5 * document["sizes"]["before"]
    assert all(one["peak_bytes"] > 0 for one in document["candidates"])
    assert "speed" in done.stderr


def test_bench_says_that_another_runtime_stood_in(qgraph: Run, work: Path):
    assert qgraph("compile", "model.onnx", "-t", "cuda-int4", "-q").returncode == 0
    done = qgraph("bench", "model.cuda-int4", "--seconds", "0.1", "--json")
    assert "'after' is not the target's own speed: it ran on the CPU provider" in " ".join(done.stderr.split())
    assert json.loads(done.stdout)["stand_in"].startswith("the CPU provider")


def test_inspect_counts(qgraph: Run, artifact: Path):
    done = qgraph("inspect", "model.onnx", "--json")
    document = json.loads(done.stdout)
    assert document["operators"] == {"MatMul": 2, "Relu": 1}
    assert document["parameters"] == 64 * 256 + 256 * 10
    assert document["weights"] == {"fp32": 4 * (64 * 256 + 256 * 10)}
    assert document["manifest"] is None
    assert re.search(r"^multiply-adds +18,944", done.stderr, re.MULTILINE)
    compiled = qgraph("inspect", artifact)
    assert compiled.returncode == 0, compiled.stderr
    assert re.search(r"^artifact +for cpu-int8, verified", compiled.stderr, re.MULTILINE)
    assert re.search(r"^int8 +16\.4 kB", compiled.stderr, re.MULTILINE)


def test_inspect_shows_before_and_after(qgraph: Run, tmp_path: Path):
    made = qgraph("compile", "model.onnx", "--target", "cpu-fp32", "--passes", "prune-neurons{ratio=0.25}", "--force")
    assert made.returncode == 0, made.stderr

    done = qgraph("inspect", "model.cpu-fp32", "--against", "model.onnx", "--json")

    document = json.loads(done.stdout)
    assert document["before"]["parameters"] == 64 * 256 + 256 * 10
    assert document["parameters"] == 64 * 192 + 192 * 10
    assert re.search(r"^multiply-adds +18,944 +14,208", done.stderr, re.MULTILINE)
    assert re.search(r"^first +16,384 +12,288 +65.5 kB +49.2 kB", done.stderr, re.MULTILINE)


def test_diff_names_the_layers(qgraph: Run, artifact: Path):
    done = qgraph("diff", "model.onnx", artifact, "--calib", "calib.npz", "--json")
    assert done.returncode == 0, done.stderr
    tensors = json.loads(done.stdout)["tensors"]
    assert tensors[-1]["node"] == "second"
    assert 5 < tensors[-1]["sqnr_db"] < 80
    assert "worst first" in done.stderr


@pytest.mark.parametrize(("verb", "kind"), [("targets", "target"), ("passes", "pass")])
def test_listings_show_every_name(capsys: pytest.CaptureFixture[str], verb: str, kind: registry.Kind):
    assert cli.main([verb, "--json"]) == 0
    shown = capsys.readouterr()
    documents = json.loads(shown.out)
    assert [one["name"] for one in documents] == registry.names(kind)
    assert not [one for one in documents if one["fault"] or not one["summary"]]
    for name in registry.names(kind):
        assert name in shown.err
        assert cli.main([verb, name]) == 0
        page = capsys.readouterr().err
        for option in next(one["options"] for one in documents if one["name"] == name):
            assert option["name"] in page
            assert option["type"] in page


@pytest.mark.parametrize(("differences", "status"), [((), 0), (("Relu has no kernel",), 3)])
def test_doctor_holds_the_tables_against_the_runtime(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, differences: tuple[str, ...], status: int
):
    check = TableCheck("onnxruntime-cpu", "1.31.1", "1.31.1", entries=2, probes={"ran": 5}, differences=differences)
    monkeypatch.setattr(capability_check, "check_tables", lambda progress: (check,))
    assert cli.main(["doctor", "--probe"]) == status
    shown = capsys.readouterr().err
    assert f"onnxruntime-cpu  {'1 difference' if differences else 'agrees'}: 2 kernels" in shown
    assert all(one in shown for one in differences)
    assert cli.main(["doctor", "--probe", "--json"]) == status
    document = json.loads(capsys.readouterr().out)
    assert document["tables"][0]["differences"] == list(differences)
    assert document["tables"][0]["agrees"] is not bool(differences)


def test_doctor_tells_what_is_usable(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert {"target": "cpu-int8", "usable": True, "missing": "", "builds": False} in document["targets"]
    assert all(one["usable"] or one["builds"] for one in document["targets"] if one["target"].startswith("cuda-"))
    assert document["runtimes"][0]["name"] == "ONNX Runtime"
    assert "CPUExecutionProvider" in document["runtimes"][0]["offers"]
    assert "ONNX Runtime" in shown.err


def test_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    found = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    survey = doctor.survey()
    (int8,) = [one for one in survey.targets if one.target == "cpu-int8"]
    assert int8.missing == "ONNX Runtime is not installed: pip install 'qgraph-compiler[cpu]'"
    assert not int8.usable
    assert doctor._missing("tvm", survey.runtimes) in (
        "",
        "apache-tvm, apache-tvm-ffi is not installed: pip install 'qgraph-compiler[tvm]'",
    )


def test_a_fault_of_ours_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken() -> None:
        raise KeyError("lost")

    monkeypatch.setattr(doctor, "survey", broken)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == (
        "error: a fault of qgraph, not of your input: KeyError: 'lost'. Set QGRAPH_DEBUG=1 for the traceback, and "
        "please report it.\n"
    )
    monkeypatch.setenv("QGRAPH_DEBUG", "1")
    assert cli.main(["doctor"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_fault():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "qgraph", "passes", "--json", "-q"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_standard_error_stops_no_work():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-P", "-m", "qgraph", "targets", "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)


def test_a_terminal_gets_a_live_display(work: Path):
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, "-P", "-m", "qgraph", "compile", "model.onnx", "-t", "cpu-int8", "--calib", "calib.npz"]
    child = subprocess.Popen(
        command, cwd=work, stdout=subprocess.DEVNULL, stderr=follower, env={**os.environ, "TERM": "xterm"}
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not piece:
            break
        shown += piece
    assert child.wait() == 0
    assert b"\x1b[1mload\x1b[0m" in shown
    assert "━".encode() in shown
    assert b"done in " in shown


def test_inspect_shows_what_runs_where(artifact: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", str(artifact), "--placement"]) == 0
    shown = capsys.readouterr().err
    assert re.search(r"^CPUExecutionProvider +(\d+) of \1$", shown, re.MULTILINE)
    assert re.search(r"^in integers +com.microsoft.DynamicQuantizeMatMul +\d+$", shown, re.MULTILINE)
    assert re.search(r"^copies between providers +0$", shown, re.MULTILINE)
    assert cli.main(["inspect", str(artifact), "--placement", "--json"]) == 0
    placement = json.loads(capsys.readouterr().out)["placement"]
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert {key: placement[key] for key in manifest["placement"]} == manifest["placement"]
    assert {one["name"]: one["sources"] for one in placement["placed"]}["relu"] == ["relu"]


def test_inspect_asks_the_runtime_of_a_target_about_a_model(work: Path, capsys: pytest.CaptureFixture[str]):
    model = str(work / "model.onnx")
    assert cli.main(["inspect", model, "--placement", "--target", "cpu-fp32", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["placement"]["kernels"]) == {"float"}
    assert cli.main(["inspect", model, "--placement", "--target", "cuda-int4", "--json"]) == 0
    foreseen = json.loads(capsys.readouterr().out)["placement"]
    assert foreseen["runtime"].endswith("foreseen from its table")
    assert foreseen["providers"] == {"CUDAExecutionProvider": 3}
    assert cli.main(["inspect", model, "--placement", "--target", "integer", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["placement"]["kernels"]) == {"float"}
    assert cli.main(["inspect", model, "--placement", "--target", "tvm-cpu"]) == 2
    assert "tvm-cpu cannot tell here what runs where" in capsys.readouterr().err
    assert cli.main(["inspect", model, "--target", "cpu-fp32"]) == 2
    assert "pass --placement with it" in capsys.readouterr().err
    assert cli.main(["inspect", model, "--placement", "--against", model]) == 2
    assert "--placement looks at one model" in capsys.readouterr().err


def test_inspect_names_the_users_file_where_the_runtime_refuses_it(work: Path, capsys: pytest.CaptureFixture[str]):
    """The runtime saw a copy of it, in a folder that is gone."""
    text = '<ir_version: 9, opset_import: ["" : 19, "my.ops" : 1]> g (float[2] x) => (float[2] y) { y = my.ops.Foo(x) }'
    ir.save(ir.from_onnx_text(text), work / "custom.onnx")
    assert cli.main(["inspect", str(work / "custom.onnx"), "--placement"]) == 2
    shown = capsys.readouterr().err
    assert f"ONNX Runtime cannot open {work / 'custom.onnx'}: " in shown
    assert tempfile.gettempdir() + "/qgraph-" not in shown


def test_compile_says_at_its_end_what_does_not_run_as_promised(qgraph: Run, work: Path):
    done = qgraph("compile", "model.onnx", "--target", "cpu-fp32", "--passes", "rtn{bits=4,group=8}")
    assert done.returncode == 0, done.stderr
    line = done.stderr.splitlines()[-2]
    assert line == "NOT AS PROMISED: 2 layers are stored in integers but run in float: first, second"
    manifest = json.loads((work / "model.cpu-fp32" / "manifest.json").read_text())
    assert manifest["placement"]["undone"] == ["first", "second"]
    assert "Stored in integers, run in float" in (work / "model.cpu-fp32" / "report.html").read_text()
