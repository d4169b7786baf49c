"""Measuring what errors of tensors do to the outputs of a model, one after the other, on few samples.

    y = f(x)    =>    y = f(x + a e),    a = 0 or 1 for each error, an input of the model

One session serves all errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.gradient_tape import Tape
from qgraph.analysis.perturbations import Perturbation, Rounding, perturbed_uses, power, rounded, run, stored
from qgraph.analysis.probes import Probe, main_values, raw_outputs
from qgraph.pipeline import Context

__all__ = ["MOST_MEASURED", "measure"]

MOST_MEASURED = 96
"""Errors that are measured at most."""
_SAMPLES = 4


def measure(
    model: ir.Model, context: Context, perturbations: Mapping[str, Perturbation], outputs: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Put errors in, one after the other, and return their noise power relative to the outputs', and what has none.

    One session serves all: each error has a factor that is 0 or 1. Few samples are run.

    Args:
        model: is not changed.
        context: samples and threads.
        perturbations: errors that are arrays or roundings.
        outputs: that count.
    """
    unknown = {
        name: "its error is a function, and a node behind it has no gradient"
        for name, one in perturbations.items()
        if not isinstance(one.error, np.ndarray | Rounding)
    }
    possible = [name for name in perturbations if name not in unknown]
    unknown |= dict.fromkeys(possible[MOST_MEASURED:], f"more than {MOST_MEASURED} would have to be measured")
    chosen = possible[:MOST_MEASURED]
    if not chosen:
        return {}, unknown
    samples = context.samples("the sensitivity analysis")
    places = np.unique(np.linspace(0, len(samples) - 1, _SAMPLES).astype(int))
    feeds = [feed for number, feed in enumerate(samples) if number in places]
    switched, factors, places_out = _switched(model, {name: perturbations[name] for name in chosen}, outputs)
    fed = frozenset([*feeds[0], *factors.values()])
    probe = Probe(switched, raw_outputs(places_out), fed, threads=context.threads)
    off = {factor: np.zeros((), np.float32) for factor in factors.values()}
    signal = np.zeros(len(outputs))
    noise = {name: np.zeros(len(outputs)) for name in chosen}
    for number, feed in enumerate(feeds):
        context.progress("measure", number, len(feeds))
        exact = run(probe, {**feed, **off}, number)
        signal += [power(array) for array in exact]
        for name, factor in factors.items():
            changed = run(probe, {**feed, **off, factor: np.ones((), np.float32)}, number)
            noise[name] += [
                power(one.astype(np.float64) - other.astype(np.float64))
                for one, other in zip(changed, exact, strict=True)
            ]
    alive = signal > 0
    relative = {name: float(np.mean(found[alive] / signal[alive])) for name, found in noise.items()}
    return relative, unknown


def _switched(
    model: ir.Model, perturbations: Mapping[str, Perturbation], outputs: Sequence[str]
) -> tuple[ir.Model, dict[str, str], list[str]]:
    """Return a copy with an input for each error, a factor that it is multiplied by, and the names of its outputs."""
    copy = model.clone()
    tape = Tape(copy)
    values = main_values(copy)
    uses = {name: perturbed_uses(copy, one) for name, one in perturbations.items()}
    named = {str(value.name): value for value in copy.graph.outputs}
    factors = {}
    for name, one in perturbations.items():
        x = values[one.value]
        factor = ir.Value(
            name=qgraph.ir.fresh_name(copy.graph, f"{one.value}_factor"),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([]),
        )
        copy.graph.inputs.append(factor)
        factors[name] = str(factor.name)
        error = one.error
        made = rounded(tape, x, error) if isinstance(error, Rounding) else stored(tape, x, np.asarray(error))
        kind = tape.dtype(x)
        amount = factor if kind == ir.DataType.FLOAT else tape.op("Cast", factor, dtype=kind, to=int(kind))
        change = tape.mul(made, amount)
        for node, index in uses[name]:
            before = node.inputs[index]
            assert before is not None
            node.replace_input_with(index, tape.add(before, change))
        if x.is_graph_output() and not one.spares_output:
            named[one.value] = tape.add(named[one.value], change)
    copy.graph.sort()
    return copy, factors, [str(named[name].name) for name in outputs]
