"""The command that compiles one model for one target."""

from __future__ import annotations

from pathlib import Path

import click

from qgraph.cli_options import PATH, Common, data_options, memory, output_options, pass_common, run_options
from qgraph.cli_options import shapes as read_shapes
from qgraph.errors import SearchInterrupted, ToleranceError, UserError

__all__ = ["compile_command"]

_STRICT_TARGET = "integer"
_STRICT = ("integer-requantize.strict=true",)


@click.command("compile")
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
