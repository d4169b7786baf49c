"""What ONNX Runtime's targets for NVIDIA GPUs share: sessions, what the manifest tells of them, and where nodes run.

The providers that a target wants are asked in order, and the CPU at last. Where the first is not installed, or its
libraries do not load, sessions run on what there is, and the artifact says so, with the remedy.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

import qgraph.ir
from qgraph.analysis.kernel_arithmetic import Arithmetic
from qgraph.analysis.provider_split import Split, split_by_provider
from qgraph.capabilities import table
from qgraph.pipeline import Pipeline, Skipped
from qgraph.runtime.placement import Placement
from qgraph.runtime.placement_foresight import foreseen_placement
from qgraph.runtime.serving import open_with
from qgraph.runtime.session import CPU_PROVIDER, installed_providers, provider_fault
from qgraph.targets.base import Kernels, Runs, Session, Target, cleaned_up
from qgraph.targets.cpu_int4 import weight_kernels
from qgraph.targets.cuda_layout import CHANNELS_LAST, prefers_channels_last

__all__ = ["CUDA", "TENSORRT", "NvidiaTarget", "once_each", "work_of"]

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
_TABLES = {CUDA: "onnxruntime-cuda", TENSORRT: "tensorrt"}
_NEEDED = {
    CUDA: "it takes an NVIDIA GPU and pip install 'qgraph-compiler[cuda]'",
    TENSORRT: "it takes an NVIDIA GPU and pip install 'qgraph-compiler[cuda]' tensorrt",
}
_CONTROL = ("If", "Loop", "Scan")
_COMPUTE = ("Attention", "Conv", "ConvTranspose", "Einsum", "GRU", "Gemm", "GroupQueryAttention", "LSTM", "MatMul",
            "MatMulBnb4", "MatMulNBits", "MultiHeadAttention", "RNN")  # fmt: skip
"""Operators without whose kernels a GPU is of no use."""
_MOST_TOLD = 3


def work_of(model: ir.Model, *operators: str) -> list[ir.Node]:
    """Return the nodes of some operators, those of subgraphs among them."""
    return [node for node in qgraph.ir.walk(model) if qgraph.ir.is_op(node, *operators)]


def once_each(refused: Sequence[Skipped]) -> list[Skipped]:
    """Return the first reason of every node."""
    first: dict[str, Skipped] = {}
    for one in refused:
        first.setdefault(one.node, one)
    return list(first.values())


@dataclasses.dataclass(frozen=True)
class NvidiaTarget(Target, abc.ABC):
    """A precision on an NVIDIA GPU, through ONNX Runtime."""

    extra: ClassVar[str] = "cuda"
    wanted: ClassVar[Sequence[str]] = (CUDA,)
    """The providers that it wants, the most wanted first; the CPU comes last by itself."""
    opset: ClassVar[int] = 18
    """The highest opset at which no release of the CUDA provider from 1.24 on loses kernels that it has earlier.

    Before the release of its table, Pad and Equal ended there; in that one, MaxPool and a few others end at 21.
    """

    def prepare_passes(self) -> Pipeline:
        """Return the clean-up passes."""
        return cleaned_up(opset=self.opset)

    def options(self) -> Mapping[str, Mapping[str, str]]:
        """Return provider -> its options."""
        return {}

    def stand_in(self) -> str:
        """Return a note where the first provider is not installed, or does not start."""
        why = self.lacks()
        if not why:
            return ""
        installed = installed_providers()
        usable = [one for one in self.wanted[1:] if one in installed and not provider_fault(one)]
        instead = _short(next(iter(usable), CPU_PROVIDER))
        return f"the {instead} provider (same operators; not run on {_short(self.wanted[0])} here: {why})"

    def lacks(self) -> str:
        """Return why the first provider does not run here, and what to do; '' where it does, or nothing is known."""
        installed, first = installed_providers(), self.wanted[0]
        if not installed:
            return ""
        return provider_fault(first) if first in installed else f"no {first} is installed: {_NEEDED[first]}"

    def providers(self) -> Sequence[tuple[str, Mapping[str, str]]]:
        """Return the providers that are wanted, with their options, the CPU's last."""
        return self._providers({})

    def _providers(self, more: Mapping[str, Mapping[str, str]]) -> Sequence[tuple[str, Mapping[str, str]]]:
        options = self.options()
        chosen = {name: {**options.get(name, {}), **more.get(name, {})} for name in self.wanted}
        return [*((name, dict(sorted(one.items()))) for name, one in chosen.items()), (CPU_PROVIDER, {})]

    def hints(self, model: ir.Model) -> Mapping[str, Mapping[str, str]]:
        """Return provider -> the options that a model wants besides."""
        if self.wanted[0] != CUDA or not prefers_channels_last(model, table(_TABLES[CUDA])):
            return {}
        return {CUDA: CHANNELS_LAST}

    def session(self, folder: Path, *, threads: int = 0) -> Session:
        """Open model.onnx with the providers that are wanted and start here, the CPU last.

        Raises:
            UserError: ONNX Runtime is not installed.
        """
        hints = self.hints(qgraph.ir.load(folder / "model.onnx")) if CUDA in installed_providers() else {}
        return open_with(self._providers(hints), folder, threads=threads, disabled=self.disabled)

    def computes(self, node: ir.Node) -> Arithmetic | None:
        """Return what a node computes in, where its operator and types do not say it."""
        del node
        return None

    def counted(self, model: ir.Model) -> Kernels:
        """Count the operators as they are written: what the provider fuses is known on the device only."""
        return weight_kernels(model, integers=False)

    def runs(self, folder: Path, *, whole: bool = True) -> Runs:
        """Return what the tables foresee, node by node as the model is written; that needs no session."""
        model = qgraph.ir.load(folder / "model.onnx")
        split = self.split(model)
        asked = table(_TABLES[self.wanted[0]])
        against = _against_cuda_graph(model, split)
        return Runs(
            kernels=self.counted(model) if whole else None,
            placement=foreseen_placement(split, f"{asked.title}, foreseen from its table", self.computes),
            footprint=None,
            runtime={
                "io_binding": True,
                "cuda_graph": {"possible": not against, "against": against},
                "parts": split.parts,
                "elsewhere": [{"node": node, "reason": reason} for node, reason in split.left],
            },
            told=_told(split, self.wanted[0]),
            providers=self._providers(self.hints(model)),
        )

    def placement(self, folder: Path) -> Placement | None:
        """Return what the tables foresee, node by node as the model is written."""
        return self.runs(folder).placement

    def kernels(self, folder: Path) -> Kernels | None:
        """Count the operators as they are written."""
        return self.runs(folder).kernels

    def runtime(self, folder: Path) -> Mapping[str, Any] | None:
        """Return whether inputs and the whole graph can stay on the GPU, and which nodes would run elsewhere."""
        return self.runs(folder).runtime

    def split(self, model: ir.Model) -> Split:
        """Return which provider would run what."""
        return split_by_provider(model, [table(_TABLES[name]) for name in self.wanted])

    def without_kernels(self, model: ir.Model, split: Split | None = None) -> list[Skipped]:
        """Return the nodes that do the work of a model and would do it on the CPU, each with the reason.

        Args:
            model: is not changed.
            split: of it, where that was made.
        """
        split = split or self.split(model)
        on_cpu = {qgraph.ir.node_label(node) for node, one in split.providers.items() if one == CPU_PROVIDER}
        working = {qgraph.ir.node_label(node) for node in qgraph.ir.walk(model) if node.op_type in _COMPUTE}
        return [
            Skipped(node, f"it would run on the CPU: {reason}")
            for node, reason in split.left
            if node in on_cpu and node in working
        ]


def _short(provider: str) -> str:
    return "TensorRT" if provider == TENSORRT else provider.removesuffix("ExecutionProvider")


def _against_cuda_graph(model: ir.Model, split: Split) -> list[str]:
    """Return what keeps a model from being captured as a CUDA graph, one line each.

    Source: ONNX Runtime, CUDA execution provider, performance tuning, CUDA graphs: no control flow, inputs of one
    shape, and all nodes on the provider; those that compute shapes may be on the CPU where nothing is copied.
    """
    against = [
        f"input '{value.name}' has a dynamic axis: fix it with --shape {value.name}=..."
        for value in model.graph.inputs
        if value.shape is None or not value.shape.is_static()
    ]
    control = sorted({node.op_type for node in qgraph.ir.walk(model) if node.op_type in _CONTROL})
    if control:
        against.append(f"it has control flow: {', '.join(control)}")
    on_cpu = [node for node, provider in split.providers.items() if provider == CPU_PROVIDER]
    counts = Counter(node.op_type for node in on_cpu if node not in split.shapes)
    if split.copies and not counts:
        against.append(f"{split.copies} tensors are copied between GPU and CPU")
    if counts:
        told = ", ".join(f"{count} {op}" for op, count in sorted(counts.items()))
        against.append(f"nodes run on the CPU: {told}")
    return against


def _told(split: Split, first: str) -> str:
    """Return one line: how many nodes run where, why, and what is copied."""
    counts = Counter(split.providers.values())
    parts = [
        f"{count} nodes on {_short(name)}" for name, count in sorted(counts.items(), key=lambda one: one[0] != first)
    ]
    others = Counter(reason for _, reason in split.left)
    why = "; ".join(f"{count}: {reason}" for reason, count in others.most_common(_MOST_TOLD))
    shapes = f" ({len(split.shapes)} of them compute shapes)" if split.shapes else ""
    copies = f"   {split.copies} copies between GPU and CPU" if split.copies else ""
    return f"{', '.join(parts)}{shapes}{copies}{f'   ({why})' if why else ''}, as predicted from the tables"
