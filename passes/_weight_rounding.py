"""What `rtn`, `hqq`, `gptq` and `adaround` share: which weights to take, in which scheme, and their way into the graph.

Convolutions, where a pass takes them, have one positive scale for each output, whatever the options say of groups and
zero points: that is what integer convolutions read.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.compressed_weights import format_scheme, total_bits
from qgraph.analysis.convolutions import OPERATORS, weighted_layers
from qgraph.analysis.linear_layers import LinearLayer, LinearLayers, matches
from qgraph.analysis.weight_storage import store
from qgraph.errors import UserError
from qgraph.numerics.channel_rounding import channel_scales, nearest, quantized
from qgraph.numerics.weights import QuantizedWeight, WeightScheme
from qgraph.passes._weight_options import chosen_bits, chosen_group, forget_bits
from qgraph.pipeline import Context, Pass, Report, Skipped

__all__ = ["PRODUCTS", "Chosen", "Prepared", "WeightRounding", "some_of"]

PRODUCTS = ("Gemm", "MatMul")
"""The operators whose weights are rounded unless a pass has an option that names others."""

Chosen = Mapping[ir.Value, tuple[Sequence[LinearLayer], WeightScheme]]
"""The weights to round: their layers, and what to round them to."""

_NEEDED_OPSET = 21
_FLOAT = 16
_BEHIND_HEAD = ("Add", "Cast", "Div", "Identity", "Mul", "Reshape", "Softmax", "Squeeze", "Tanh", "Unsqueeze")
"""What stands between the last product of a model and its output: a bias, a soft cap, a change of type or shape."""
_LONGEST_TAIL = 6


@dataclass(frozen=True)
class Prepared:
    """How the rounded weights are had, and what there is to tell.

    Attributes:
        producers: by weight; what computes it, or returns it where it is known already.
        notes: for the reader.
        figures: for programs.
    """

    producers: Mapping[ir.Value, Callable[[], QuantizedWeight]]
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightRounding(Pass):
    """The options and the rewrite of passes that round weights; subclasses say how."""

    bits: int = field(default=4, metadata={"help": "bits of a weight: 2, 3, 4, 5, 6 or 8"})
    group: int = field(default=32, metadata={"help": "inputs that share a scale; 0: all of an output"})
    symmetric: bool = field(default=False, metadata={"help": "no zero points"})
    embeddings: bool = field(default=True, metadata={"help": "round embedding tables too"})
    embedding_bits: int = field(default=0, metadata={"help": "bits of embedding tables; 0: as the others"})
    head_bits: int = field(
        default=0, metadata={"help": "bits of layers that give an output of the model; 0: as the others, 16: in float"}
    )
    min_elements: int = field(default=1024, metadata={"help": "smaller weights stay in float"})
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "patterns (*, ?) of names of nodes to leave alone"})

    def scheme(self, bits: int) -> WeightScheme:
        """Return the scheme of a weight with `bits` bits; ValueError if the options do not go together."""
        return WeightScheme(bits=bits, group=self.group, symmetric=self.symmetric)

    def operators(self) -> tuple[str, ...]:
        """Return the operators whose weights are rounded, besides embedding tables."""
        return PRODUCTS

    def round(self, weight: np.ndarray, scheme: WeightScheme) -> QuantizedWeight:
        """Round a weight [N, K]."""
        raise NotImplementedError

    def round_convolution(self, weight: np.ndarray, scheme: WeightScheme) -> QuantizedWeight:
        """Round the weight [N, K] of a convolution, to the nearest at the scales of least squared error."""
        scale = channel_scales(weight, scheme.bits)
        return quantized(nearest(weight, scale[:, None], scheme.bits), scale, scheme)

    def prepare(self, model: ir.Model, context: Context, chosen: Chosen) -> Prepared:
        """Look at the model before it changes; the default rounds each weight on its own."""
        del model, context
        return Prepared({weight: self._producer(some[0], scheme) for weight, (some, scheme) in chosen.items()})

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Round the weights, when the file is written; `skipped` has every node with one that stays in float.

        Raises:
            UserError: the options do not go together, or the model's opset is below 21. While the file is written: a
                weight is NaN or infinite.
        """
        operators = self.operators()
        unknown = [one for one in operators if one not in (*PRODUCTS, *OPERATORS)]
        if unknown:
            raise UserError(f"{self.name}: ops has '{unknown[0]}'; there are {', '.join((*OPERATORS, *PRODUCTS))}")
        for bits in (self.bits, self.embedding_bits, self.head_bits):
            if bits and bits != _FLOAT:
                self._checked_scheme(bits)
        chosen, skipped = self._chosen(context.analyse(weighted_layers, model, operators))
        if not chosen:
            return Report(skipped=skipped)
        opset = model.graph.opset_imports.get("", 1)
        if opset < _NEEDED_OPSET:
            raise UserError(
                f"{self.name}: compressed weights need opset {_NEEDED_OPSET}, and the model has {opset}: put "
                f"convert-opset{{version={_NEEDED_OPSET}}} before"
            )
        prepared = self.prepare(model, context, chosen)
        context.keep_reference(model)
        counts: Counter[str] = Counter()
        elements, information = 0, 0.0
        ragged: list[str] = []
        for weight, (layers, scheme) in chosen.items():
            first = layers[0]
            store(model, first, scheme, prepared.producers[weight])
            forget_bits(layer.node for layer in layers)
            counts[format_scheme(scheme)] += 1
            elements += first.inputs * first.outputs
            information += total_bits(scheme, first.outputs, first.inputs)
            if 0 < scheme.group < first.inputs and first.inputs % scheme.group:
                ragged.append(f"{first.name} ({first.inputs} inputs in groups of {scheme.group})")
        notes = [f"{count} weight{'s' * (count > 1)} as {scheme}" for scheme, count in sorted(counts.items())]
        notes.append(f"{information / elements:.2f} bits per weight, scales included")
        if ragged:
            notes.append(f"the last group is shorter in {some_of(ragged)}")
        notes += prepared.notes
        figures: Mapping[str, Any] = {
            "weights": len(chosen),
            "elements": elements,
            "bits_per_weight": information / elements,
            **prepared.figures,
        }
        changed = sum(len(layers) for layers, _ in chosen.values())
        return Report(changed=changed, skipped=skipped, notes=notes, figures=figures)

    def _checked_scheme(self, bits: int) -> WeightScheme:
        try:
            return self.scheme(bits)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error

    def _chosen(
        self, found: LinearLayers
    ) -> tuple[dict[ir.Value, tuple[Sequence[LinearLayer], WeightScheme]], list[Skipped]]:
        """Return the layers and the scheme of every weight to round."""
        chosen: dict[ir.Value, tuple[Sequence[LinearLayer], WeightScheme]] = {}
        skipped = list(found.skipped)
        for weight, layers in found.by_weight.items():
            bits = chosen_bits((layer.node for layer in layers), self.default_bits(layers))
            reason = self._why_not(layers, bits)
            if reason is None and bits is not None:
                group = chosen_group((layer.node for layer in layers), self.group)
                scheme = dataclasses.replace(self._checked_scheme(bits), group=group)
                if layers[0].kind == "convolution":
                    scheme = WeightScheme(bits=bits, group=0, symmetric=True)
                chosen[weight] = layers, scheme
            else:
                skipped += [Skipped(layer.name, reason or "") for layer in layers]
        return chosen, skipped

    def default_bits(self, layers: Sequence[LinearLayer]) -> int:
        """Return the width of a weight without marks; one that is table and head at once has the wider of the two."""
        widths = [self.embedding_bits or self.bits for layer in layers if layer.kind == "embedding"]
        widths += [self.head_bits or self.bits for layer in layers if _is_head(layer)]
        return max(widths, default=self.bits)

    def _why_not(self, layers: Sequence[LinearLayer], bits: int | None) -> str | None:
        excluded = [layer for layer in layers if matches(layer.name, self.exclude)]
        if len(excluded) == len(layers):
            return "it is excluded"
        if excluded:
            return f"its weight is shared with '{excluded[0].name}', which is excluded"
        foreign = [layer.node.op_type for layer in layers if layer.kind == "linear"]
        if any(one not in self.operators() for one in foreign):
            return f"{foreign[0]} is not among 'ops'"
        if not self.embeddings and any(layer.kind == "embedding" for layer in layers):
            shared = "; the output layer shares it" if len(layers) > 1 else ""
            return f"it is an embedding table, and embeddings=false{shared}"
        if layers[0].inputs * layers[0].outputs < self.min_elements:
            return f"its weight has fewer than {self.min_elements} elements"
        if bits is None:
            return "it was chosen to stay in float"
        return None

    def _producer(self, layer: LinearLayer, scheme: WeightScheme) -> Callable[[], QuantizedWeight]:
        """Return what rounds a layer's weight, from the file that it lies in, whenever it is asked for."""
        tensor, transposed = layer.weight.const_value, layer.transposed
        label = f"the weight '{layer.weight.name}' of '{layer.name}'"
        assert tensor is not None

        def produce() -> QuantizedWeight:
            array = tensor.numpy()
            try:
                if layer.kind == "convolution":
                    return self.round_convolution(layer.matrix(), scheme)
                return self.round(array if transposed else array.T, scheme)
            except ValueError as error:
                wrong = np.argwhere(~np.isfinite(array.astype(np.float32)))
                if not len(wrong):
                    raise
                index = tuple(wrong[0].tolist())
                raise UserError(f"{self.name}: {label} holds {array[index]} at {index}: mend the model") from error

        return produce


def _is_head(layer: LinearLayer) -> bool:
    """Tell whether nothing but a bias, a cap and the like stands between a product and an output of the model."""
    if layer.kind == "embedding":
        return False
    value = layer.node.outputs[0]
    for _ in range(_LONGEST_TAIL):
        if value.is_graph_output():
            return True
        reader = qgraph.ir.only_consumer(value)
        if not qgraph.ir.is_op(reader, *_BEHIND_HEAD):
            return False
        assert reader is not None
        value = reader.outputs[0]
    return False


def some_of(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
