"""Measure what fewer weights cost and save: heads, neurons and channels cut, thin products, zeros.

    python benchmarks/pruning.py [--only sentences,channels,low-rank,sparsity,size] [--quick] [-o PRUNING.json]

writes the JSON, with the parts that did not run as they were there, and the tables beside it as a page. Sentences and
images need the real models and data (QGRAPH_ASSETS). Everything is calibrated on splits that no score sees.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import data
import language
import numpy as np
import onnx_ir as ir
import timing
from onnx import TensorProto, helper, numpy_helper

import qgraph.compiler
import qgraph.errors
import qgraph.ir
from qgraph.analysis.cost import cost
from qgraph.analysis.coupling import coupling
from qgraph.pipeline import Context, Pipeline
from qgraph.targets.cpu import CpuFp32

__all__: list[str] = []

HERE = Path(__file__).resolve().parent
Figures = dict[str, Any]
WORST, RANDOM = "importance=magnitude,reconstruct=false", "importance=random,reconstruct=false"
SEEDS = 4
"""Of the mean over random choices."""


def claim(what: str, must: str, found: str, reached: bool) -> Figures:
    """Return what is to be reached, and whether it was."""
    return {"what": what, "must": must, "found": found, "reached": bool(reached)}


# --- sentences --------------------------------------------------------------------------------------------------------

HEADS, NEURONS = "prune-heads{{ratio={}{}}}", "prune-neurons{{ratio={}{}}}"
BOTH = f"{HEADS},{NEURONS}"


def sentences(quick: bool) -> Figures:
    """MiniLM with fewer heads and neurons, in float and then in int8."""
    task = data.TASKS["minilm_dynamo_sdpa"]
    assert isinstance(task, data.Sentences)
    task = dataclasses.replace(task, pairs=500) if quick else task
    feeds = list(task.calibration())
    less = BOTH.format(0.2, "", 0.2, "")
    wanted = {
        "float32": ("cpu-fp32", ""),
        "25 % of the heads": ("cpu-fp32", HEADS.format(0.25, "")),
        "25 % of the neurons": ("cpu-fp32", NEURONS.format(0.25, "")),
        "25 % of the neurons, by magnitude, no fit": ("cpu-fp32", NEURONS.format(0.25, f",{WORST}")),
        "25 % of both": ("cpu-fp32", BOTH.format(0.25, "", 0.25, "")),
        "20 % of both": ("cpu-fp32", less),
        "int8": ("cpu-int8", ""),
        "20 % of both, int8": ("cpu-int8", f"{less},{{int8}}"),
    }
    rows: list[Figures] = _at_random(task)
    with tempfile.TemporaryDirectory() as scratch:
        sessions = {}
        int8 = ""
        for number, (name, (target, passes)) in enumerate(wanted.items()):
            start = time.perf_counter()
            passes = passes.replace("{int8}", int8)
            made = qgraph.compiler.compile(
                task.model(), target, output=Path(scratch) / str(number), calibration=feeds, passes=passes or None
            )
            seconds = time.perf_counter() - start
            path = made.path / "model.onnx"
            if name == "int8":
                int8 = json.loads((made.path / "manifest.json").read_text())["pipeline"]["compress"]
            sessions[name] = timing.session(path)
            row = {"name": name, "passes": passes, "score": _score(task, path), "bytes": path.stat().st_size}
            rows.append({**row, "seconds": seconds})
            print(f"  {name:<44} {row['score']:.2f}  {row['bytes'] / 1e6:.1f} MB  {seconds:.0f} s", flush=True)
        timed = [name for name in wanted if "magnitude" not in name]
        evaluation = list(task.evaluation())
        chosen = evaluation[:: len(evaluation) // (8 if quick else 24)]
        taken = timing.in_turn({name: sessions[name] for name in timed}, chosen)
    base = np.median(np.asarray(taken["float32"]) / np.asarray([taken[name] for name in timed]), axis=1)
    ratios = dict(zip(timed, map(float, base), strict=True))
    for row in rows:
        row["faster"] = ratios.get(row["name"])
    return {"rows": rows, "claims": _claims_of_sentences({row["name"]: row for row in rows})}


def _at_random(task: data.Sentences) -> list[Figures]:
    """Return what cutting at random leaves, the mean over seeds."""
    wanted = {
        "25 % of the heads, at random": HEADS.format(0.25, f",{RANDOM}"),
        "25 % of the neurons, at random": NEURONS.format(0.25, f",{RANDOM}"),
        "25 % of both, at random": BOTH.format(0.25, f",{RANDOM}", 0.25, f",{RANDOM}"),
    }
    whole = _prepared(task.model())
    rows: list[Figures] = []
    for name, passes in wanted.items():
        scores = []
        for seed in range(SEEDS):
            model = whole.clone()
            Pipeline.parse(passes).run(model, context=Context(seed=seed))
            scores.append(_score_of(task, model))
        rows.append({"name": name, "passes": passes, "score": float(np.mean(scores)), "scores": scores})
        print(f"  {name:<44} {np.mean(scores):.2f}  {min(scores):.2f} to {max(scores):.2f}", flush=True)
    return rows


def _claims_of_sentences(rows: dict[str, Figures]) -> list[Figures]:
    def lost(name: str, against: str = "float32") -> float:
        return float(rows[against]["score"] - rows[name]["score"])

    found = [
        claim(
            f"25 % of the {what}",
            f"loses at most {bound}",
            f"{lost(f'25 % of the {what}'):+.2f}",
            lost(f"25 % of the {what}") <= bound,
        )
        for what, bound in (("heads", 1.0), ("neurons", 1.5))
    ]
    for what in ("25 % of the heads", "25 % of the neurons", "25 % of both"):
        ours, floor = lost(what), lost(f"{what}, at random")
        found.append(
            claim(
                f"{what} against chance",
                "far above (a quarter of the loss)",
                f"{ours:+.2f}, {floor:+.2f}",
                ours <= floor / 4,
            )
        )
    both, pruned, plain = rows["25 % of both"], rows["20 % of both, int8"], rows["int8"]
    sums = lost("int8") + lost("20 % of both")
    sizes = f"{plain['bytes'] / 1e6:.1f} to {pruned['bytes'] / 1e6:.1f} MB"
    faster = pruned["faster"] / plain["faster"]
    together = lost("20 % of both, int8")
    return [
        *found,
        claim("25 % of both", "1.2 times as fast", f"{both['faster']:.2f}", both["faster"] >= 1.2),
        claim("20 % of both with int8, against int8", "smaller", sizes, pruned["bytes"] < plain["bytes"]),
        claim("20 % of both with int8, against int8", "faster", f"{faster:.2f}", faster > 1.0),
        # Three tenths of a point are chance on this split.
        claim(
            "20 % of both with int8",
            "loses what the parts lose (within 0.1)",
            f"{together:+.2f}, {sums:+.2f}",
            together <= sums + 0.1,
        ),
    ]


def _prepared(path: Path) -> ir.Model:
    model = qgraph.ir.load(path)
    CpuFp32().prepare_passes().run(model)
    return model


def _score(task: data.Task, path: Path) -> float:
    session = timing.session(path)
    found = task.score(np.concatenate([task.features(session.run(None, feed), feed) for feed in task.evaluation()]))
    assert found is not None
    return found


def _score_of(task: data.Task, model: ir.Model) -> float:
    with tempfile.TemporaryDirectory() as folder:
        qgraph.ir.save(model, Path(folder) / "model.onnx")
        return _score(task, Path(folder) / "model.onnx")


# --- channels ---------------------------------------------------------------------------------------------------------


def channels(quick: bool) -> Figures:
    """ResNet-32 with 30 % of its multiply-adds less."""
    del quick
    task = data.TASKS["resnet32"]
    feeds = list(task.calibration())
    amount = "ratio=0.3,of=multiply-adds"
    wanted = {
        "float32": "",
        "magnitude, no fit": f"prune-channels{{{amount},{WORST}}}",
        "at random, no fit": f"prune-channels{{{amount},{RANDOM}}}",
        "ours": f"prune-channels{{{amount}}}",
        "ours, ranked together": f"prune-channels{{{amount},scope=global}}",
    }
    rows: list[Figures] = []
    for name, passes in wanted.items():
        model = _prepared(task.model())
        start = time.perf_counter()
        Pipeline.parse(passes).run(model, calibration=feeds)
        seconds = time.perf_counter() - start
        adds = cost(model.clone(), {}).multiply_adds
        rows.append({"name": name, "passes": passes, "score": _score_of(task, model), "multiply_adds": adds})
        rows[-1] |= {"parameters": qgraph.ir.parameter_count(model), "seconds": seconds}
        share = adds / rows[0]["multiply_adds"]
        print(f"  {name:<24} {rows[-1]['score']:.2f}  {share:.1%} of the multiply-adds  {seconds:.0f} s", flush=True)
    base, worst = rows[0]["score"], rows[1]["score"]
    best = next(row["score"] for row in rows if row["name"] == "ours")
    recovered = (best - worst) / (base - worst)
    return {
        "rows": rows,
        "claims": [
            claim(
                "ResNet-32, 30 % of the multiply-adds",
                "half of what magnitude loses recovered",
                f"{base - best:.2f} lost against {base - worst:.2f}: {recovered:.0%}",
                recovered >= 0.5,
            )
        ],
    }


# --- low rank ---------------------------------------------------------------------------------------------------------


def low_rank(quick: bool) -> Figures:
    """80 % of the parameters of the linear layers, in thin products."""
    windows = 60 if quick else None
    rows: list[Figures] = []
    claims = []
    for name in ("minilm_dynamo_sdpa", *language.MODELS):
        lost: dict[str, float] = {}
        judge, feeds, model = _judge(name, windows)
        base = judge(model)
        for method in ("svd", "activation"):
            thin = model.clone()
            start = time.perf_counter()
            report = Pipeline.parse(f"low-rank{{ratio=0.2,method={method}}}").run(thin, calibration=feeds)
            row = {"name": name, "method": method, "float32": base, "score": judge(thin)}
            row |= {"seconds": time.perf_counter() - start, "notes": report.parts[0].notes}
            row["less"] = 1 - qgraph.ir.parameter_count(thin) / qgraph.ir.parameter_count(model)
            lost[method] = abs(row["score"] - base)
            rows.append(row)
            print(f"  {name:<20} {method:<10} {base:.4f} -> {row['score']:.4f}  {row['seconds']:.0f} s", flush=True)
        share = lost["activation"] / lost["svd"]
        found = f"{lost['activation']:.3f} against {lost['svd']:.3f}: {share:.0%}"
        claims.append(claim(f"{name}, activation-aware", "at most half of what plain SVD loses", found, share <= 0.5))
    return {"rows": rows, "claims": claims}


def _judge(name: str, windows: int | None) -> tuple[Callable[[ir.Model], float], list[Any], ir.Model]:
    """Return a score (nats a token, or Spearman's correlation x100), calibration feeds, and the prepared model."""
    if name in language.MODELS:
        found = language.MODELS[name](windows)
        model = found.model.clone()
        CpuFp32().prepare_passes().run(model)
        return lambda one: language.nats(found, one), found.calibration, model
    task = data.TASKS[name]
    return lambda one: _score_of(task, one), list(task.calibration()), _prepared(task.model())


# --- zeros ------------------------------------------------------------------------------------------------------------


def sparsity(quick: bool) -> Figures:
    """2 of 4 weights of language models zero."""
    rows: list[Figures] = []
    claims = []
    texts = {method: f"sparsify{{pattern=2:4,method={method}}}" for method in ("magnitude", "wanda", "sparsegpt")}
    texts["one sweep"] = "gptq{bits=4,group=32,sparse=2:4}"
    texts["in sequence"] = "sparsify{pattern=2:4,method=sparsegpt},gptq{bits=4,group=32}"
    for name in language.MODELS:
        judge, feeds, model = _judge(name, 60 if quick else None)
        base = judge(model)
        lost: dict[str, float] = {}
        for method, text in texts.items():
            zeroed = model.clone()
            start = time.perf_counter()
            try:
                Pipeline.parse(f"convert-opset{{version=21}},{text}").run(zeroed, calibration=feeds)
            except qgraph.errors.UserError as error:
                print(f"  {name:<16} {method:<12} does not run: {error}", flush=True)
                continue
            seconds = time.perf_counter() - start
            lost[method] = judge(language.as_floats(zeroed)) - base
            rows.append({"name": name, "method": method, "float32": base, "lost": lost[method], "seconds": seconds})
            print(f"  {name:<16} {method:<12} {lost[method]:+.4f} nats  {seconds:.0f} s", flush=True)
        order = [lost[method] for method in ("sparsegpt", "wanda", "magnitude")]
        shown = " < ".join(f"{math.exp(base + one):.2f}" for one in order)
        claims.append(claim(f"{name}, 2:4, perplexity", "SparseGPT < Wanda < magnitude", shown, order == sorted(order)))
        if {"one sweep", "in sequence"} <= set(lost):
            both = f"{lost['one sweep']:+.3f}, {lost['in sequence']:+.3f}"
            better = lost["one sweep"] < lost["in sequence"]
            claims.append(claim(f"{name}, 2:4 and 4 bits in one sweep", "loses less than in sequence", both, better))
    return {"rows": rows, "claims": claims}


# --- size -------------------------------------------------------------------------------------------------------------


def size(quick: bool) -> Figures:
    """Networks of up to 20,000 nodes: seconds of one core (OMP_NUM_THREADS=1)."""
    counts = (1_000, 2_000, 4_000) if quick else (2_500, 5_000, 10_000, 20_000)
    rows: list[Figures] = []
    for name, (build, text) in _works().items():
        seconds = []
        for count in counts:
            model = build(count)
            start = time.process_time()
            if text:
                Pipeline.parse(text).run(model, calibration=_feeds(model))
            else:
                coupling(model, Context())
            seconds.append(time.process_time() - start)
        rows.append({"name": name, "nodes": counts, "seconds": seconds})
        print(
            f"  {name:<44} " + "  ".join(f"{count} {one:.1f} s" for count, one in zip(counts, seconds, strict=True)),
            flush=True,
        )
    return {
        "rows": rows,
        "claims": [
            claim(
                f"{row['name']}, {counts[-1]} nodes",
                "under 60 s, about linear",
                f"{row['seconds'][-1]:.1f} s, {row['seconds'][-1] / row['seconds'][0]:.1f} times {counts[0]} nodes",
                row["seconds"][-1] < 60 and row["seconds"][-1] < 1.5 * row["seconds"][0] * counts[-1] / counts[0],
            )
            for row in rows
        ],
    }


def _works() -> dict[str, tuple[Callable[[int], ir.Model], str]]:
    """Return networks, and the passes that run on them; '' stands for the analysis of coupled dimensions alone."""
    found: dict[str, tuple[Callable[[int], ir.Model], str]] = {}
    both = ("", "low-rank{min_elements=0}", "low-rank{min_elements=0,method=svd}", "sparsify{min_elements=0}")
    for text in (*both, "prune-heads", "prune-neurons", "prune-layers"):
        found[f"transformer, {text or 'coupled dimensions'}"] = _encoder, text
    for text in (*both, "prune-channels"):
        found[f"residual network, {text or 'coupled dimensions'}"] = _convolutional, text
    return found


def _feeds(model: ir.Model) -> list[dict[str, np.ndarray]]:
    dims = [1 if not isinstance(dim, int) else dim for dim in model.graph.inputs[0].shape or ()]
    random = np.random.default_rng(0)
    return [{"x": random.normal(size=dims).astype(np.float32)} for _ in range(4)]


class _Writer:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.random = np.random.default_rng(0)

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        return name

    def constant(self, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return str(self.constants[-1].name)

    def weight(self, *shape: int, gain: float = 1.0) -> str:
        scale = gain / math.sqrt(shape[0] if len(shape) == 2 else math.prod(shape[1:]))
        return self.constant((self.random.normal(size=shape) * scale).astype(np.float32))

    def finish(self, output: str, shape: list[Any]) -> ir.Model:
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        self.nodes.append(helper.make_node("Identity", [output], ["y"], name="last"))
        result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "large", [given], [result], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return ir.from_proto(model)


def _encoder(nodes: int) -> ir.Model:
    """Return a transformer of 32 wide, with 4 heads, written out."""
    to = _Writer()
    width, heads = 32, 4
    apart = to.constant(np.array([0, 0, heads, width // heads]))
    joined = to.constant(np.array([0, 0, width]))
    one, zero = to.constant(np.ones(width, np.float32)), to.constant(np.zeros(width, np.float32))
    x = "x"
    while len(to.nodes) < nodes:
        n = to.node("LayerNormalization", x, one, zero, axis=-1)
        q, k, v = (to.node("Reshape", to.node("MatMul", n, to.weight(width, width)), apart) for _ in range(3))
        q, v = (to.node("Transpose", each, perm=[0, 2, 1, 3]) for each in (q, v))
        shares = to.node("Softmax", to.node("MatMul", q, to.node("Transpose", k, perm=[0, 2, 3, 1])), axis=-1)
        mixed = to.node("Transpose", to.node("MatMul", shares, v), perm=[0, 2, 1, 3])
        out = to.node("MatMul", to.node("Reshape", mixed, joined), to.weight(width, width))
        x = to.node("Add", x, out)
        n = to.node("LayerNormalization", x, one, zero, axis=-1)
        h = to.node("Relu", to.node("Add", to.node("MatMul", n, to.weight(width, 48)), to.weight(48)))
        x = to.node("Add", x, to.node("MatMul", h, to.weight(48, width)))
    return to.finish(x, ["n", 6, width])


def _convolutional(nodes: int) -> ir.Model:
    """Return a residual network of 8 channels."""
    to = _Writer()
    x = "x"
    while len(to.nodes) < nodes:
        h = to.node("Relu", to.node("Conv", x, to.weight(12, 8, 3, 3), to.weight(12), pads=[1, 1, 1, 1]))
        # Thousands of blocks that each add to the stream: with little, so that it stays in range.
        h = to.node("Conv", h, to.weight(8, 12, 1, 1, gain=0.02), to.weight(8, gain=0.02))
        x = to.node("Relu", to.node("Add", x, h))
    return to.finish(x, ["n", 8, 6, 6])


# --- the page ---------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[bool], Figures]] = {
    "sentences": sentences,
    "channels": channels,
    "low-rank": low_rank,
    "sparsity": sparsity,
    "size": size,
}


def render(
    results: Figures,
    parts: Mapping[str, Callable[..., Figures]] = PARTS,
    title: str = "Fewer weights",
    file: str = "pruning.py",
) -> str:
    """Return the page, in Markdown."""
    machine = results["machine"]
    where = (
        f"{machine['processor']}, {machine['cores']} cores; onnxruntime {machine['onnxruntime']}, numpy "
        f"{machine['numpy']}. `benchmarks/{file}` made it; only ratios of times mean something elsewhere."
    )
    lines = [f"# {title}", "", where, "", "| what | must reach | found | reached |", "|---|---|---|---|"]
    for part in results["parts"].values():
        for one in part["claims"]:
            verdict = "yes" if one["reached"] else "**no**"
            lines.append(f"| {one['what']} | {one['must']} | {one['found']} | {verdict} |")
    for name, part in results["parts"].items():
        shown = (parts[name].__doc__ or "").strip().rstrip(".") + (" (quick)" if part["quick"] else "")
        columns = [key for key in part["rows"][-1] if key != "notes"]
        lines += ["", f"## {shown}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(_cell(row.get(key)) for key in columns)} |" for row in part["rows"]]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else f"`{value}`" if "{" in str(value) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="fewer samples to judge by, and smaller networks")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "PRUNING.json")
    options = parser.parse_args(arguments)
    results: Figures = {"machine": {}, "parts": {}}
    if options.output.is_file():
        results = json.loads(options.output.read_text())
    for name in options.only.split(","):
        if name not in PARTS:
            parser.error(f"there is no part '{name}'; there are: {', '.join(PARTS)}")
        print(name, flush=True)
        results["machine"] = timing.machine()
        results["parts"][name] = {**PARTS[name](options.quick), "quick": options.quick}
        results["parts"] = {part: results["parts"][part] for part in PARTS if part in results["parts"]}
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(render(results))
    claims = [one for part in results["parts"].values() for one in part["claims"]]
    print(f"{sum(one['reached'] for one in claims)} of {len(claims)} reached")
    return 0


if __name__ == "__main__":
    sys.exit(main())
