"""Passes, pipelines of passes, what they share while they run, and what they report.

    Pipeline([FoldBatchNorm(), Qdq(per_channel=True)])        Python
    "fold-batch-norm,qdq{per_channel=true}"                   text
    [[pass]]                                                  TOML recipe
    name = "fold-batch-norm"

The three forms convert into one another without loss.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

import qgraph.ir
from qgraph import registry, spec
from qgraph.errors import UserError

__all__ = [
    "Context",
    "Feeds",
    "IrPass",
    "Pass",
    "PassError",
    "Pipeline",
    "Progress",
    "Report",
    "Rewrite",
    "Samples",
    "Skipped",
]

T = TypeVar("T")
Feeds = dict[str, np.ndarray]
"""One feed: input name -> array, as a session takes it."""


class Samples(Protocol):
    """Calibration data: feeds that can be gone through more than once, always in the same order."""

    def __iter__(self) -> Iterator[Feeds]: ...

    def __len__(self) -> int: ...


class Progress(Protocol):
    """Called while a long step runs."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """Take the step's name, how many units are done, and of how many."""
        ...


class PassError(Exception):
    """A pass broke or left an invalid model: a fault of the pass, not of the user's input."""


class Skipped(NamedTuple):
    """A node that a pass left alone although it might have been expected to change it, and why."""

    node: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What a pass did.

    A pass fills `changed` (number of nodes rewritten), `skipped`, `notes` (short remarks for the reader, such as
    "19 Dropout removed") and `figures` (JSON values for programs); the pipeline fills the rest.
    The report of a pipeline has one part for each pass and sums them up.
    """

    changed: int = 0
    skipped: Sequence[Skipped] = ()
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    parts: Sequence[Report] = ()

    def __bool__(self) -> bool:
        return True


def _silent(step: str, done: int, total: int) -> None:
    del step, done, total


@dataclasses.dataclass
class Context:
    """What the passes of one run share.

    Attributes:
        seed: for anything random.
        calibration: feeds for the model's inputs, or None.
        progress: called by long steps.
        threads: for numerics and sessions; 0 lets the runtime choose.
        calibration_memory: bound in bytes on activations held at once while calibrating.
        opset: the default-domain opset that the target executes best, or None to keep the model's.
        work_folder: where long steps keep what they have finished, to go on from there if they are stopped; None keeps
            nothing.
        reference: the model as it was before the first pass that lost something (see `keep_reference`), or None.
        promises: what passes have made sure of and the passes behind must not undo: called with the model after every
            pass, each returns what is wrong, or None.
    """

    seed: int = 0
    calibration: Samples | None = None
    progress: Progress = _silent
    threads: int = 0
    calibration_memory: int = 1 << 30
    opset: int | None = None
    work_folder: Path | None = None
    reference: ir.Model | None = None
    promises: list[Callable[[ir.Model], str | None]] = dataclasses.field(default_factory=list, repr=False)
    _analyses: dict[tuple[Callable[..., Any], tuple[Any, ...]], Any] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def analyse(self, analysis: Callable[..., T], model: ir.Model, *arguments: Any) -> T:
        """Return `analysis(model, self, *arguments)`, computed once until a pass changes the model.

        The arguments must be hashable.
        """
        key = (analysis, arguments)
        if key not in self._analyses:
            self._analyses[key] = analysis(model, self, *arguments)
        return self._analyses[key]  # type: ignore[no-any-return]

    def forget(self, preserved: frozenset[Callable[..., Any]] = frozenset()) -> None:
        """Drop the cached analyses, except those that the last pass preserves."""
        self._analyses = {key: value for key, value in self._analyses.items() if key[0] in preserved}

    def keep_reference(self, model: ir.Model) -> None:
        """Keep `model` as the reference, unless there is one: a pass that loses something calls this before it does.

        Passes that mend what was lost compare with it. It shares its weights with the model, but no values: what
        passes put in the place of a weight does not reach it.
        """
        if self.reference is None:
            self.reference = model.clone()

    def samples(self, what: str) -> Samples:
        """Return the calibration data.

        Raises:
            UserError: there are none; `what` names who needs them.
        """
        if self.calibration is None:
            raise UserError(f"{what} needs calibration data: pass --calib DATA (or calibration=feeds in Python)")
        return self.calibration


class Pass(ir.passes.InPlacePass):
    """A rewriting of a model. Derive a frozen dataclass whose fields are the options, with their defaults.

    A qgraph pass is an `onnx_ir` in-place pass, so it can stand in an `onnx_ir` pipeline as well.
    """

    name: ClassVar[str]
    """How the command line and recipes call it."""
    preserves: ClassVar[frozenset[Callable[..., Any]]] = frozenset()
    """The analyses that stay true when this pass has changed the model."""

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Change `model` in place and report what was changed and what was left alone, with reasons."""
        raise NotImplementedError

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run as an `onnx_ir` pass, with a default context."""
        report = self.apply(model, Context())
        return ir.passes.PassResult(model, modified=report.changed > 0)


def _locate(path: str, what: str) -> Any:
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise UserError(f"{what} is '{path}', but must be written module:attribute")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{what}: {path} cannot be loaded: {error}") from error


def _foreign_path(thing: object) -> str | None:
    """Return module:Class when importing that class and calling it without arguments makes `thing` again."""
    cls = type(thing)
    if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls or cls.__module__ == "__main__":
        return None
    try:
        again = not vars(thing) or vars(cls()) == vars(thing)
    except TypeError:
        return None
    return f"{cls.__module__}:{cls.__qualname__}" if again else None


@dataclasses.dataclass(frozen=True)
class IrPass(Pass):
    """Any `onnx_ir` pass that needs no arguments, named as module:Class; in Python, `Pipeline` takes the object."""

    name: ClassVar[str] = "onnx-ir"
    of: str

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Run the pass. One that returns another model object is refused: pipelines change models in place."""
        del context
        cls = _locate(self.of, "the option 'of' of 'onnx-ir'")
        if not (isinstance(cls, type) and issubclass(cls, ir.passes.PassBase)):
            raise UserError(f"'onnx-ir': {self.of} is not an onnx_ir pass")
        return _run_ir_pass(cls(), model)


@dataclasses.dataclass(frozen=True)
class Rewrite(Pass):
    """Any `onnxscript` rewrite rule or rule set, named as module:attribute; in Python, `Pipeline` takes the object."""

    name: ClassVar[str] = "rewrite"
    rules: str

    def apply(self, model: ir.Model, context: Context) -> Report:
        """Apply the rules until none matches."""
        del context
        return _run_rules(_locate(self.rules, "the option 'rules' of 'rewrite'"), model)


@dataclasses.dataclass(frozen=True)
class _Foreign(Pass):
    """An `onnx_ir` pass or `onnxscript` rule set given as a Python object; it may have no text form."""

    name: ClassVar[str] = "foreign"
    thing: Any

    def apply(self, model: ir.Model, context: Context) -> Report:
        del context
        if isinstance(self.thing, ir.passes.PassBase):
            return _run_ir_pass(self.thing, model)
        return _run_rules(self.thing, model)


def _run_ir_pass(ir_pass: ir.passes.PassBase, model: ir.Model) -> Report:
    result = ir_pass(model)
    if result.model is not model:
        raise UserError(f"{type(ir_pass).__name__} returns a new model; a pipeline needs passes that work in place")
    return Report(changed=int(result.modified))


def _run_rules(rules: Any, model: ir.Model) -> Report:
    from onnxscript import rewriter

    if isinstance(rules, rewriter.RewriteRule):
        rules = [rules]
    if isinstance(rules, Sequence) and all(isinstance(rule, rewriter.RewriteRule) for rule in rules):
        rules = rewriter.RewriteRuleSet(list(rules))
    if not isinstance(rules, rewriter.RewriteRuleSet):
        raise UserError(f"{rules!r} is not an onnxscript rewrite rule or rule set")
    changed = rules.apply_to_model(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return Report(changed=changed)


def _as_pass(thing: Any) -> Pass:
    if isinstance(thing, Pass):
        return thing
    if isinstance(thing, type) and issubclass(thing, Pass):
        raise UserError(f"a pipeline takes passes, not classes: write {thing.__name__}()")
    if isinstance(thing, ir.passes.PassBase):
        path = _foreign_path(thing)
        return IrPass(path) if path is not None else _Foreign(thing)
    if isinstance(thing, str):
        raise UserError(f"a pipeline takes passes, not text: write Pipeline.parse({thing!r})")
    if hasattr(thing, "apply_to_model") or isinstance(thing, Sequence):
        return _Foreign(thing)
    raise UserError(f"{thing!r} is neither a pass nor an onnxscript rule set")


class Pipeline:
    """Passes in the order in which they run.

    Args:
        passes: qgraph passes, `onnx_ir` passes and `onnxscript` rule sets, in any mixture.
    """

    def __init__(self, passes: Iterable[Any] = ()) -> None:
        self.passes: tuple[Pass, ...] = tuple(_as_pass(thing) for thing in passes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline([*self.passes, *other.passes])

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(map(repr, self.passes))})"

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read the text form, such as `fold-batch-norm,qdq{per_channel=true}`.

        Raises:
            UserError: it does not parse, or names an unknown pass or option.
        """
        return cls.from_specs(spec.parse_specs(text))

    @classmethod
    def from_specs(cls, specs: Iterable[spec.Spec]) -> Pipeline:
        """Make the passes that `specs` name."""
        return cls([spec.build(_pass_class(one.name), one) for one in specs])

    @classmethod
    def from_toml(cls, text: str) -> Pipeline:
        """Read a recipe's `[[pass]]` tables, each with a `name` and its options.

        Raises:
            UserError: the text is not TOML or holds something else than such tables.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"the recipe is not valid TOML: {error}") from None
        for key in document:
            if key != "pass":
                raise UserError(f"the recipe has an unknown key '{key}'; a pipeline is written as [[pass]] tables")
        return cls.from_specs(specs_from_tables(document.get("pass", []), "pass"))

    def specs(self) -> list[spec.Spec]:
        """Return name and changed options of every pass.

        Raises:
            UserError: the pipeline holds a Python object that text cannot name.
        """
        for one in self.passes:
            if isinstance(one, _Foreign):
                raise UserError(
                    f"{type(one.thing).__name__} was given as an object and has no text form: put it in a module and "
                    "name it with onnx-ir{of=module:Class} or rewrite{rules=module:attribute}"
                )
        return [spec.to_spec(one) for one in self.passes]

    def to_text(self) -> str:
        """Write the text form; `parse` reads it back."""
        return spec.format_specs(self.specs())

    def to_toml(self, table: str = "pass") -> str:
        """Write a recipe's tables; `from_toml` reads them back."""
        return "\n".join(_toml_table(one, table) for one in self.specs())

    def describe(self) -> str:
        """Return the text form, with Python objects that have none shown in angle brackets."""
        return ",".join(
            f"<{type(one.thing).__name__}>" if isinstance(one, _Foreign) else spec.format_specs([spec.to_spec(one)])
            for one in self.passes
        )

    def run(
        self,
        model: ir.Model,
        *,
        calibration: Iterable[Feeds] | None = None,
        context: Context | None = None,
        after_pass: Callable[[Report], None] | None = None,
    ) -> Report:
        """Run the passes over `model`, in place, and check the model after each.

        Args:
            model: is changed; if a pass raises, it may be left between two valid states.
            calibration: any iterable of feeds; replaces the context's.
            context: what the passes share; a new one when None.
            after_pass: called with each pass's report as it ends.

        Raises:
            UserError: the input or an option is at fault.
            PassError: a pass is at fault; the message names it, what ran before, and the node.
        """
        context = context if context is not None else Context()
        if calibration is not None:
            feeds = calibration if isinstance(calibration, Sequence) else list(calibration)
            context = dataclasses.replace(context, calibration=feeds, _analyses={})
        reports: list[Report] = []
        _check(model, "the model as given", [])
        nodes_before = qgraph.ir.count_nodes(model)
        for one in self.passes:
            reports.append(self._run_one(one, model, context, reports))
            if after_pass is not None:
                after_pass(reports[-1])
        return _sum(reports, nodes_before, qgraph.ir.count_nodes(model))

    def _run_one(self, one: Pass, model: ir.Model, context: Context, before: Sequence[Report]) -> Report:
        name = one.thing.__class__.__name__ if isinstance(one, _Foreign) else one.name
        ran = [report.name for report in before]
        nodes_before, start = qgraph.ir.count_nodes(model), time.perf_counter()
        try:
            report = one.apply(model, context)
        except (UserError, MemoryError, OSError):
            raise
        except Exception as error:
            raise PassError(f"pass '{name}' failed{_after(ran)}: {type(error).__name__}: {error}") from error
        if not isinstance(report, Report):
            raise PassError(f"pass '{name}' returned {type(report).__name__}, not a Report{_after(ran)}")
        seconds = time.perf_counter() - start
        qgraph.ir.forget_names(model)
        _check(model, f"pass '{name}'", ran)
        if report.changed:
            for broken in filter(None, (promise(model) for promise in context.promises)):
                raise PassError(f"pass '{name}' broke what one before it made sure of{_after(ran)}: {broken}")
            context.forget(one.preserves)
        return dataclasses.replace(
            report,
            name=name,
            nodes_before=nodes_before,
            nodes_after=qgraph.ir.count_nodes(model),
            seconds=seconds,
        )


def _pass_class(name: str) -> type[Pass]:
    cls: type[Pass] = registry.find("pass", name)
    return cls


def _after(ran: Sequence[str]) -> str:
    return f" (after {', '.join(ran)})" if ran else " (the first pass)"


def _check(model: ir.Model, who: str, ran: Sequence[str]) -> None:
    problem = qgraph.ir.check(model)
    if problem is None:
        return
    if who.startswith("pass"):
        raise PassError(f"{who} left an invalid model{_after(ran)}: {problem}")
    raise UserError(f"{who} is invalid: {problem}")


def _sum(reports: Sequence[Report], nodes_before: int, nodes_after: int) -> Report:
    return Report(
        changed=sum(report.changed for report in reports),
        skipped=tuple(skipped for report in reports for skipped in report.skipped),
        notes=tuple(note for report in reports for note in report.notes),
        name="pipeline",
        nodes_before=nodes_before,
        nodes_after=nodes_after,
        seconds=sum(report.seconds for report in reports),
        parts=tuple(reports),
    )


def specs_from_tables(tables: object, where: str) -> list[spec.Spec]:
    """Read the specs of a recipe's array of tables.

    Raises:
        UserError: a table has no name, or an option is neither an atom nor a list of atoms.
    """
    if not isinstance(tables, list):
        raise UserError(f"the recipe must write [[{where}]], in double brackets, for every pass")
    specs = []
    for number, table in enumerate(tables, start=1):
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            raise UserError(f'the recipe\'s [[{where}]] number {number} has no name = "..."')
        options: dict[str, spec.Value] = {}
        for raw_key, value in table.items():
            key = raw_key.replace("-", "_")
            if key in options:
                raise UserError(f"the recipe gives option '{key}' of '{table['name']}' twice")
            if key != "name":
                options[key] = spec.read_toml_value(value, f"the recipe's option '{key}' of '{table['name']}'")
        specs.append(spec.Spec(table["name"], options))
    return specs


def _toml_table(one: spec.Spec, table: str) -> str:
    lines = [f"[[{table}]]", f"name = {spec.format_toml(one.name)}"]
    lines += [f"{key} = {spec.format_toml(value)}" for key, value in one.options.items()]
    return "\n".join(lines) + "\n"
