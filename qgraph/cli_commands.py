"""The commands: each parses its arguments, makes one call into the API, and prints what comes back.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

import qgraph
from qgraph.cli_build import build
from qgraph.cli_compare import compare
from qgraph.cli_options import PATH, Common, data_options, memory, output_options, pass_common, run_options
from qgraph.cli_options import shapes as read_shapes
from qgraph.errors import SearchInterrupted, ToleranceError, UserError, nearest

if TYPE_CHECKING:
    from qgraph.registry import Kind
    from qgraph.runtime.capability_check import TableCheck

__all__ = ["commands"]

_STRICT_TARGET = "integer"
_DIFFERS = 3
"""Exit status where something does not hold that was promised."""
_STRICT = ("integer-requantize.strict=true",)


class _Commands(click.Group):
    """A group that suggests the nearest command for one that it does not have."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            ctx.fail(f"there is no command '{name}'.{nearest(name, self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)  # in the order of use, not of the alphabet


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(qgraph.__version__, prog_name="qgraph", message="%(prog)s %(version)s")
def commands() -> None:
    """Make ONNX models smaller and faster, and prove that they still behave."""


@commands.command("compile")
@click.argument("model", metavar="MODEL.onnx", type=PATH)
@click.option(
    "--target", "-t", metavar="NAME", required=True, help="What to compile for, as `qgraph targets` lists it."
)
@click.option("--output", "-o", metavar="DIR", type=PATH, help="The artifact's folder [default: MODEL.TARGET].")
@click.option("--force", is_flag=True, help="Replace an artifact that stands at the output.")
@click.option("--calib", metavar="DATA", help=".npz, folder of .npz or images, text file, or module:callable.")
@click.option(
    "--calib-memory", metavar="SIZE", callback=memory, help="Bound on activations held at once [default: 1GiB]."
)
@data_options
@click.option("--verify-data", metavar="DATA", help="Verify on these samples instead of a held-back share of --calib.")
@click.option(
    "--shape", "shapes", metavar="INPUT=1,3,224,224", callback=read_shapes, multiple=True, help="Fix dynamic axes."
)
@click.option("--passes", metavar="TEXT", help="Replace the compress part: 'pass{option=value},pass'.")
@click.option("--recipe", metavar="FILE.toml", type=PATH, help="Replace the parts of the pipeline that a recipe names.")
@click.option("--set", "settings", metavar="PASS.OPTION=VALUE", multiple=True, help="Set one option; repeatable.")
@click.option(
    "--tolerance",
    metavar="METRIC=VALUE",
    multiple=True,
    help="Bound on sqnr, cosine, max_abs, top1 or eval, searched for if need be.",
)
@click.option(
    "--eval", "evaluation", metavar="MODULE:FUNCTION", help="Your measure: session -> number, higher is better."
)
@click.option(
    "--budget", metavar="size=8MB|latency=0.5x", multiple=True, help="Search for the most accurate within it."
)
@click.option(
    "--executor", metavar="NAME", default="", help="Where a search runs: processes [default] or ray://HOST:PORT."
)
@click.option(
    "--cpu", metavar="NAME", help="The processor to compile for: vnni, avx2 or neon; a TVM target's own names."
)
@click.option(
    "--tune",
    metavar="[N]",
    is_flag=False,
    flag_value="0",
    type=click.IntRange(min=0),
    help="Time candidates on this machine and keep the choice; N kernels with a TVM target.",
)
@click.option(
    "--emit", metavar="c|so", multiple=True, help="Write code too (target integer): C99 sources, or a library by TVM."
)
@click.option("--strict", is_flag=True, help="Refuse a model of which anything stays in float (target integer).")
@click.option("--resume", is_flag=True, help="Go on from the layers that a run which was stopped has finished.")
@click.option("--cache", metavar="DIR", type=PATH, help="Keep the model behind long passes here, for the next time.")
@run_options
@output_options
@pass_common
def compile_command(
    common: Common,
    *,
    model: Path,
    target: str,
    output: Path | None,
    force: bool,
    calib: str | None,
    calib_memory: int | None,
    verify_data: str | None,
    shapes: dict[str, tuple[int, ...]],
    passes: str | None,
    recipe: Path | None,
    settings: tuple[str, ...],
    tolerance: tuple[str, ...],
    evaluation: str | None,
    budget: tuple[str, ...],
    executor: str,
    cpu: str | None,
    tune: int | None,
    emit: tuple[str, ...],
    strict: bool,
    resume: bool,
    cache: Path | None,
) -> int:
    """Compile MODEL.onnx for a target into a verified artifact."""
    from qgraph.cache import Cache
    from qgraph.compiler import compile as compile_model
    from qgraph.runtime.tolerances import parse_budget, parse_tolerance
    from qgraph.target_options import read_target, with_option

    chosen = read_target(target)
    if strict and chosen.name != _STRICT_TARGET:
        raise UserError(f"--strict is for the target {_STRICT_TARGET}, and this is {target}")
    if cpu is not None:
        chosen = with_option(chosen, "cpu", cpu, "--cpu")
    failure: ToleranceError | SearchInterrupted | None = None
    with common.display() as display:
        try:
            artifact = compile_model(
                model,
                chosen,
                output=output,
                calibration=common.optional_data(calib, labelled=verify_data is None),
                verify_data=common.optional_data(verify_data),
                passes=passes,
                recipe=recipe,
                settings=(*settings, *_STRICT) if strict else settings,
                tolerance=dict(map(parse_tolerance, tolerance)),
                evaluation=evaluation,
                budget=dict(map(parse_budget, budget)),
                executor=executor,
                shapes=shapes,
                context=common.context(display, calib_memory),
                force=force,
                tune=tune is not None,
                trials=tune or 0,
                resume=resume,
                emit=emit,
                cache=None if cache is None else Cache(cache, tell=display.warn),
                observer=display.event,
                on_rung=display.rung,
            )
        except (ToleranceError, SearchInterrupted) as error:
            artifact, failure = error.result, error
        display.artifact(artifact)
    common.print_json(artifact.to_json())
    if failure is not None:
        raise failure
    return 0


commands.add_command(build)


@commands.command()
@click.argument("artifact", metavar="ARTIFACT", type=PATH)
@click.option("--input", "-i", "source", metavar="X.npz", required=True, help="Samples, as for --calib.")
@click.option("--output", "-o", metavar="Y.npz", type=PATH, help="Write the outputs here.")
@click.option("--force", is_flag=True, help="Replace a file that stands at the output.")
@data_options
@run_options
@output_options
@pass_common
def run(
    common: Common,
    *,
    artifact: Path,
    source: str,
    output: Path | None,
    force: bool,
) -> int:
    """Run an artifact on samples."""
    from qgraph import verbs
    from qgraph.cli_pages import outputs_table

    with common.display() as display:
        result = verbs.run(
            artifact,
            common.data(source),
            output=output,
            force=force,
            context=common.context(display),
        )
        display.table(outputs_table(result))
    common.print_json(result.to_json())
    return 0


@commands.command()
@click.argument("artifact", metavar="ARTIFACT", type=PATH)
@click.option("--data", "source", metavar="X.npz", help="Samples, as for --calib [default: random].")
@click.option("--source", "model", metavar="MODEL.onnx", type=PATH, help="The source [default: beside the artifact].")
@click.option("--tolerance", metavar="METRIC=VALUE", multiple=True, help="Replace the bounds it was compiled with.")
@click.option(
    "--eval", "evaluation", metavar="MODULE:FUNCTION", help="Your measure: session -> number, higher is better."
)
@data_options
@run_options
@output_options
@pass_common
def verify(
    common: Common,
    *,
    artifact: Path,
    source: str | None,
    model: Path | None,
    tolerance: tuple[str, ...],
    evaluation: str | None,
) -> int:
    """Prove again that an artifact matches its source."""
    from qgraph import compiler
    from qgraph.cli_pages import verification_table
    from qgraph.runtime.tolerances import parse_tolerance

    failure: ToleranceError | None = None
    with common.display() as display:
        try:
            result = compiler.verify(
                artifact,
                source=model,
                data=common.optional_data(source),
                tolerance=dict(map(parse_tolerance, tolerance)) if tolerance else None,
                evaluation=evaluation,
                context=common.context(display),
            )
        except ToleranceError as error:
            result, failure = error.result, error
        display.step("verify", f"{result.samples} samples   {result.summary()}")
        display.table(verification_table(result))
    common.print_json(result.to_json())
    if failure is not None:
        raise failure
    return 0


@commands.command()
@click.argument("artifact", metavar="ARTIFACT", type=PATH)
@click.option("--against", metavar="MODEL", type=PATH, help="Model or artifact to compare with [default: the source].")
@click.option("--data", "source", metavar="X.npz", help="Samples, as for --calib [default: random].")
@click.option(
    "--shape", "shapes", metavar="INPUT=8,128", callback=read_shapes, multiple=True, help="Shape of random samples."
)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="How long to measure.")
@data_options
@run_options
@output_options
@pass_common
def bench(
    common: Common,
    *,
    artifact: Path,
    against: Path | None,
    source: str | None,
    shapes: dict[str, tuple[int, ...]],
    seconds: float,
) -> int:
    """Measure latency, throughput, memory and size."""
    from qgraph import verbs
    from qgraph.cli_pages import bench_table

    with common.display() as display:
        result = verbs.bench(
            artifact,
            against=against,
            data=common.optional_data(source),
            shapes=shapes,
            seconds=seconds,
            context=common.context(display),
        )
        display.table(bench_table(result))
    common.print_json(result.to_json())
    return 0


@commands.command()
@click.argument("model", metavar="MODEL|ARTIFACT", type=PATH)
@click.option("--against", metavar="MODEL", type=PATH, help="What it was made from: show before and after, by layer.")
@click.option("--placement", is_flag=True, help="Show what runs where instead: kernels, providers, precisions.")
@click.option(
    "--target", "-t", metavar="NAME", help="Whose runtime tells the placement [default: the artifact's, or cpu-fp32]."
)
@output_options
@pass_common
def inspect(common: Common, model: Path, against: Path | None, *, placement: bool, target: str | None) -> int:
    """Show operators, weights, precisions and bytes."""
    from qgraph import verbs
    from qgraph.cli_pages import inspection_tables, placement_tables

    if target is not None and not placement:
        raise UserError("--target says whose runtime tells the placement: pass --placement with it")
    if against is not None and placement:
        raise UserError("--placement looks at one model: leave out --against, and ask for the other by itself")
    result = verbs.inspect(model, against, placement=placement, target=target)
    with common.display() as display:
        for table in inspection_tables(result) if result.placement is None else placement_tables(result.placement):
            display.table(table)
            display.line()
    common.print_json(result.to_json())
    return 0


@commands.command()
@click.argument("model", metavar="MODEL", type=PATH)
@click.argument("artifact", metavar="ARTIFACT", type=PATH)
@click.option("--calib", metavar="DATA", required=True, help="Samples to compare on, as for compile.")
@data_options
@run_options
@output_options
@pass_common
def diff(
    common: Common,
    *,
    model: Path,
    artifact: Path,
    calib: str,
) -> int:
    """Show the error layer by layer: where the accuracy goes."""
    from qgraph import verbs
    from qgraph.cli_pages import difference_tables

    with common.display() as display:
        result = verbs.diff(
            model,
            artifact,
            common.data(calib),
            context=common.context(display),
        )
        for table in difference_tables(result):
            display.table(table)
    common.print_json(result.to_json())
    return 0


@commands.command()
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--output", "-o", metavar="MODEL.onnx", type=PATH, help="Where to write [default: DIR.onnx].")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of weights, activations and cache.",
)
@click.option("--no-cache", is_flag=True, help="Neither take nor give keys and values: for scoring, not for decoding.")
@click.option("--force", is_flag=True, help="Replace a model that stands at the output.")
@output_options
@pass_common
def export(
    common: Common,
    *,
    folder: Path,
    output: Path | None,
    dtype: Literal["float32", "float16"],
    no_cache: bool,
    force: bool,
) -> int:
    """Write a Hugging Face style folder (config.json and safetensors) as an ONNX model, without torch.

    Decoders of the Llama, Mistral, Qwen 2 and 3, Phi 3 and Gemma 1 to 3 kinds.
    """
    from qgraph.models.decoder import export as export_decoder
    from qgraph.report.units import bytes_text, count_text

    output = output or folder.resolve().with_name(f"{folder.resolve().name}.onnx")
    with common.display() as display:
        result = export_decoder(folder, output, dtype=dtype, cache=not no_cache, force=force, progress=display.progress)
        facts = f"{result.family}   {count_text(result.parameters)} parameters, {result.dtype}"
        display.step("export", f"{facts}{'' if result.cache else ', no cache'}   {bytes_text(result.bytes)}")
        display.line("  ".join(str(file) for file in result.files))
    common.print_json(result.to_json())
    return 0


@commands.group("eval", cls=_Commands)
def evaluate() -> None:
    """Measure what a model is worth on data of its task."""


@evaluate.command("perplexity")
@click.argument("model", metavar="ARTIFACT|MODEL.onnx", type=PATH)
@click.option(
    "--text", metavar="FILE", type=PATH, required=True, help="UTF-8 text; of a .jsonl, each line is a document."
)
@click.option(
    "--tokenizer", metavar="FILE", type=PATH, required=True, help="tokenizer.json, or `bytes` for models over bytes."
)
@click.option(
    "--window", metavar="N", type=click.IntRange(min=2), help="Tokens read at once [default: 512, or the model's]."
)
@click.option(
    "--stride", metavar="N", type=click.IntRange(min=1), help="Tokens between windows [default: half a window]."
)
@click.option(
    "--batch", metavar="N", type=click.IntRange(min=1), help="Windows run together [default: as fit 128 MiB]."
)
@run_options
@output_options
@pass_common
def perplexity(
    common: Common,
    *,
    model: Path,
    text: Path,
    tokenizer: Path,
    window: int | None,
    stride: int | None,
    batch: int | None,
) -> int:
    """Score a text with a language model: nats per token, bits per byte, perplexity."""
    from qgraph.cli_pages import perplexity_table
    from qgraph.evaluation import text_perplexity

    with common.display() as display:
        result = text_perplexity(
            model,
            text,
            tokenizer,
            window=window,
            stride=stride,
            batch=batch,
            threads=common.jobs,
            progress=display.progress,
        )
        display.table(perplexity_table(result))
    common.print_json(result.to_json())
    return 0


@commands.command()
@click.argument("name", required=False)
@output_options
@pass_common
def targets(common: Common, name: str | None) -> int:
    """List the targets, or show one with every option and default."""
    return _show_catalog(common, "target", name)


@commands.command()
@click.argument("name", required=False)
@output_options
@pass_common
def passes(common: Common, name: str | None) -> int:
    """List the passes, or show one with every option and default."""
    return _show_catalog(common, "pass", name)


def _show_catalog(common: Common, kind: Kind, name: str | None) -> int:
    from qgraph import catalog
    from qgraph.cli_pages import catalog_table, show_entry

    with common.display() as display:
        if name is not None:
            one = catalog.entry(kind, name)
            show_entry(display, one)
            document: Any = one.to_json()
        else:
            entries = catalog.catalog(kind)
            display.table(catalog_table(kind, entries))
            document = [one.to_json() for one in entries]
    common.print_json(document)
    return 0


@commands.command()
@click.option("--probe", is_flag=True, help="Hold the tables of capabilities against the installed runtimes too.")
@output_options
@pass_common
def doctor(common: Common, *, probe: bool) -> int:
    """Tell which runtimes and targets are usable here.

    --probe asks the runtimes for their kernels, loads small models of every operator and data type, and says what is
    otherwise than the tables that the targets go by; the exit status is then 3.
    """
    from qgraph.cli_pages import probe_lines, survey_tables
    from qgraph.doctor import survey
    from qgraph.runtime.capability_check import check_tables

    result = survey()
    document = result.to_json()
    checks: tuple[TableCheck, ...] = ()
    with common.display() as display:
        for table in survey_tables(result):
            display.table(table)
            display.line()
        if probe:
            checks = check_tables(display.progress)
            document["tables"] = [one.to_json() for one in checks]
            for name, text in probe_lines(checks):
                display.step(name, text)
    common.print_json(document)
    return 0 if all(one.agrees for one in checks) else _DIFFERS


commands.add_command(compare)
