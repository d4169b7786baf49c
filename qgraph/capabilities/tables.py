"""The tables: which operators a runtime executes, with which data types, under which constraints, and says who."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qgraph.capabilities.constraints import Constraint

__all__ = [
    "DEFAULT_DOMAINS",
    "PROCESSORS",
    "ByteProduct",
    "Entry",
    "Fusion",
    "Table",
    "Types",
    "operator_name",
]

DEFAULT_DOMAINS = ("", "ai.onnx")
PROCESSORS = ("avx2", "avx512", "vnni")
"""x86 processors by the instructions that integer kernels look for: AVX2 alone, AVX-512 (core), and VNNI of either."""


@dataclasses.dataclass(frozen=True)
class Types:
    """Data types by input or output index.

    Attributes:
        by_index: index -> the types that it may have.
        others: those of every other index; None: any.
    """

    by_index: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    others: tuple[str, ...] | None = None

    def of(self, index: int) -> tuple[str, ...] | None:
        """Return the types that an index may have; None: any."""
        return self.by_index.get(index, self.others)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One kernel, or several that differ in data types only.

    Attributes:
        name: of the operator, with its domain where that is not the default one.
        since: least version of the operator's domain that a model may import.
        until: the greatest, or None.
        inputs: their types.
        outputs: their types.
        constraints: all of which must hold.
        source: key of `Table.sources`.
        note: shown behind the reason of a refusal, or ''.
    """

    name: str
    since: int = 0
    until: int | None = None
    inputs: Types = Types()
    outputs: Types = Types()
    constraints: tuple[Constraint, ...] = ()
    source: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Fusion:
    """What a runtime makes of several nodes.

    Attributes:
        pattern: the nodes, in the words of a probe that shows it.
        when: what must hold, in words.
        kernel: what runs in their place; '' where they stay as they are.
        source: key of `Table.sources`.
        arithmetic: "integers" or "float" where a kernel may compute in either, else ''.
    """

    pattern: str
    when: tuple[str, ...] = ()
    kernel: str = ""
    source: str = ""
    arithmetic: str = ""


@dataclasses.dataclass(frozen=True)
class ByteProduct:
    """How a kernel adds products of bytes, by what the processor has.

    Attributes:
        kernel: its name, or nodes that become one, as fusions write them.
        weights: its inputs that are weights.
        activations: type of what they are multiplied with; "float32" where the kernel quantizes it itself.
        stored: type of the weights.
        when: what else holds, in words.
        saturates: the PROCESSORS on which sums of two products are cut to 16 bits; on others all sums are exact.
        source: key of `Table.sources`.
    """

    kernel: str
    weights: tuple[int, ...]
    activations: str
    stored: str
    when: tuple[str, ...] = ()
    saturates: tuple[str, ...] = ()
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """What a runtime, with one of its providers, executes.

    Attributes:
        name: of the table.
        runtime: as people call it.
        provider: of ONNX Runtime; '' for a runtime without providers.
        version: of the runtime, of which the facts were taken.
        opset: the highest version of the default domain that it takes, or None.
        sources: key -> where a fact comes from.
        operators: name of an operator -> its entries, which are alternatives.
        conversions: data types without a kernel of their own that the runtime converts -> what it computes in.
        fusions: what it makes of several nodes.
        products: how its kernels add products of bytes.
    """

    name: str
    runtime: str
    provider: str
    version: str
    opset: int | None = None
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    operators: Mapping[str, tuple[Entry, ...]] = dataclasses.field(default_factory=dict)
    conversions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fusions: tuple[Fusion, ...] = ()
    products: tuple[ByteProduct, ...] = ()

    @property
    def title(self) -> str:
        """The runtime with its provider, as people call them."""
        return f"{self.runtime}'s {self.provider}" if self.provider else self.runtime


def operator_name(domain: str, op_type: str) -> str:
    """Return an operator as tables call it: with its domain where that is not the default one."""
    return op_type if domain in DEFAULT_DOMAINS else f"{domain}.{op_type}"
