"""`serve-demo`: the program of the repository."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def serve_demo(arguments: Sequence[str]) -> int:
    """Runs examples/demo/serve.py, which a checkout of the repository has; its exit status."""
    script = Path(__file__).parents[2] / "examples" / "demo" / "serve.py"
    if not script.is_file():
        print(f"serve-demo: {script} is not here; a checkout of the repository has it", file=sys.stderr)
        return 2
    return int(runpy.run_path(str(script))["main"](list(arguments)))
