"""`python -m lora_kernels`: doctor, bench, tune, serve-demo. Without typer and rich only doctor
runs, in plain text."""

import sys
from collections.abc import Sequence

from lora_kernels._version import __version__

PROGRAM = "python -m lora_kernels"
WANTED = "pip install typer rich (or lora_kernels[cli])"


def main(arguments: Sequence[str]) -> int:
    """Runs a command; the exit status: 0, 1 where the command found something wrong, 2 where it
    could not begin."""
    try:
        from lora_kernels.commands.app import run_command
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click"):
            raise
        return run_without_typer(list(arguments))
    return run_command(arguments)


def run_without_typer(arguments: list[str]) -> int:
    """What there is without typer and rich."""
    if arguments == ["--version"]:
        print(__version__)
        return 0
    if arguments in (["doctor"], ["doctor", "--json"]):
        from lora_kernels.commands.doctor import doctor

        return doctor(as_json="--json" in arguments)
    asked = arguments[0] if arguments and not arguments[0].startswith("-") else None
    usage = f"usage: {PROGRAM} doctor [--json] | --version; bench, tune and serve-demo want typer and rich: {WANTED}"
    print(f"{asked}: typer or rich is not installed: {WANTED}" if asked else usage, file=sys.stderr)
    return 0 if arguments == ["--help"] else 2
