"""What runs where: node by node, with which kernel, of which provider, in which precision."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

__all__ = ["DEQUANTIZED", "PlacedNode", "Placement", "kernel_counts"]

DEQUANTIZED = "what it reads is stored in integers, and made float again at every run: there is no kernel for its form"
"""The remark on a layer that was quantized in vain."""
COPIES = ("MemcpyFromHost", "MemcpyToHost")


@dataclasses.dataclass(frozen=True)
class PlacedNode:
    """A node as the runtime executes it.

    Attributes:
        name: that the runtime has for it.
        kernel: the operator, with its domain where that is not the default one.
        provider: that runs it; '' for a runtime without providers.
        arithmetic: "integer", "low-bit" for floats with weights of few bits, "float", or "none" for what moves,
            compares or converts data.
        inputs: types of its inputs, '' where one is not known.
        outputs: types of its outputs.
        sources: labels of the nodes of the model that it stands for, as far as names tell; none for what the runtime
            put in.
        remark: why a layer that has integer forms computes in float, or why the provider that is wanted most does not
            run a node, or ''.
    """

    name: str
    kernel: str
    provider: str
    arithmetic: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    remark: str = ""

    @property
    def precision(self) -> str:
        """The types that go in and come out, such as "uint8, int8 -> uint8"."""
        taken, given = (", ".join(dict.fromkeys(filter(None, types))) or "?" for types in (self.inputs, self.outputs))
        return f"{taken} -> {given}"


@dataclasses.dataclass(frozen=True)
class Placement:
    """All nodes of a model, in the order in which they are executed.

    Attributes:
        nodes: those of subgraphs included, whether a run comes to them or not.
        runtime: that was asked, with its version.
        foreseen_copies: copies between providers for which there are no nodes yet.
    """

    nodes: tuple[PlacedNode, ...]
    runtime: str = ""
    foreseen_copies: int = 0

    @property
    def copies(self) -> int:
        """Number of copies between the memories of providers."""
        return self.foreseen_copies + sum(node.kernel in COPIES for node in self.nodes)

    @property
    def undone(self) -> tuple[PlacedNode, ...]:
        """Layers that are stored in integers and run in float all the same."""
        return tuple(node for node in self.nodes if node.remark == DEQUANTIZED)

    def counted(self, attribute: str) -> dict[str, int]:
        """Return a node's "provider", "kernel", "arithmetic" or "precision" -> number of nodes, most frequent first."""
        counts = Counter(str(getattr(node, attribute)) for node in self.nodes)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def kernels(self) -> dict[str, dict[str, int]]:
        """Return arithmetic -> kernel -> number of nodes, each the most frequent first."""
        found: dict[str, dict[str, int]] = {}
        for kind in self.counted("arithmetic"):
            part = Placement(tuple(node for node in self.nodes if node.arithmetic == kind))
            found[kind] = part.counted("kernel")
        return found

    def summary(self) -> dict[str, Any]:
        """Return counts, as JSON values that are the same whenever the runtime is."""
        providers: Mapping[str, int] = self.counted("provider")
        return {
            "runtime": self.runtime,
            "nodes": len(self.nodes),
            "providers": dict(sorted(providers.items())),
            "kernels": {kind: dict(sorted(counts.items())) for kind, counts in sorted(self.kernels().items())},
            "precisions": dict(sorted(self.counted("precision").items())),
            "copies": self.copies,
            "undone": [" + ".join(node.sources) or node.name for node in self.undone],
        }

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: the summary, and every node."""
        nodes = [{**dataclasses.asdict(node), "precision": node.precision} for node in self.nodes]
        return {**self.summary(), "placed": nodes}


_KINDS = {"integer": "integer", "low-bit": "low_bit", "float": "float", "none": "other"}


def kernel_counts(manifest: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return "integer", "low_bit", "float" and "other" -> kernel -> number of them, for whoever shows an artifact.

    From the placement, which knows every node, where the manifest has one; else from what the target counted. Empty
    where neither is known.
    """
    kernels, placement = manifest.get("kernels"), manifest.get("placement")
    if not placement:
        return {name: dict(kernels[name]) for name in _KINDS.values() if name in kernels} if kernels else {}
    found: dict[str, dict[str, int]] = {name: {} for name in _KINDS.values()}
    for kind, counts in placement["kernels"].items():
        for kernel, count in counts.items():
            group, name = found[_KINDS[kind]], kernel.rpartition(".")[2]
            group[name] = group.get(name, 0) + count
    return found
