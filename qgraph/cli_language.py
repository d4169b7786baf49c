"""The commands for language models: written from their weights, and measured on text."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from qgraph.cli_options import PATH, Common, output_options, pass_common, run_options

__all__ = ["export", "perplexity"]


@click.command()
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


@click.command("perplexity")
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
