"""The commands and their options, by typer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_kernels._version import __version__
from lora_kernels.commands import PROGRAM
from lora_kernels.commands import bench as benchmark
from lora_kernels.commands import doctor as examination
from lora_kernels.commands import serve_demo as demo
from lora_kernels.commands import tune as tuner

Dtype = Literal["bfloat16", "float16", "float32"]
app = typer.Typer(
    name=PROGRAM, help="LoRA and DoRA on fused kernels: what is here, is it faster for me, tune it.", no_args_is_help=True,
    add_completion=False,
)  # fmt: skip


def run_command(arguments: Sequence[str]) -> int:
    """Runs a command and gives its exit status."""
    try:
        app(list(arguments), prog_name=PROGRAM)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    """LoRA and DoRA on fused kernels: what is here, is it faster for me, tune it."""


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="For programs, and for bug reports.")] = False) -> None:
    """What is here, what is missing and how to get it; one checked forward. Exits with 1 if it is
    wrong."""
    raise typer.Exit(examination.doctor(as_json=json))


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="MODEL_OR_SHAPE", help="A folder or Hugging Face id, or 4096x4096: in x out.")],
    tokens: Annotated[int, typer.Option(help="In one call.", min=1)] = 512,
    rank: Annotated[int, typer.Option(help="Of the adapters.", min=1)] = 16,
    dtype: Annotated[Dtype | None, typer.Option(help="The model's own if not given, float32 of a shape.")] = None,
    device: Annotated[str | None, typer.Option(help="The GPU if there is one.")] = None,
    seconds: Annotated[float, typer.Option(help="For each row of the table.")] = 3.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draws a picture, by matplotlib.")] = None,
) -> None:
    """Is it faster for me? PEFT, these kernels and the layer without an adapter, in turn in one
    process: LoRA and DoRA, forward and step (forward and backward)."""
    raise typer.Exit(benchmark.bench(what, tokens, rank, dtype, device, seconds, plot))


@app.command()
def tune(
    seconds: Annotated[float, typer.Option(help="About how long it may take.")] = 60.0,
    dtype: Annotated[Dtype, typer.Option()] = "bfloat16",
    rank: Annotated[int, typer.Option(min=1)] = 16,
    layer: Annotated[list[str] | None, typer.Option(metavar="INxOUT", help="Such a layer; may be repeated.")] = None,
) -> None:
    """Times the ways to compute common layers on the GPU that is here, and keeps the fastest for
    this user."""
    raise typer.Exit(tuner.tune(seconds, dtype, rank, layer or []))


@app.command(
    "serve-demo", add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def serve_demo(context: typer.Context) -> None:
    """Many adapters over one model, beside PEFT's ways; needs a checkout of the repository.
    serve-demo --help: its options."""
    raise typer.Exit(demo.serve_demo(context.args))
