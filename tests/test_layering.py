"""Imports go one way: csrc ← ops ← nn ← adapters ← serving ← integrations ← commands; backends never import each other."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_kernels"
MAY_IMPORT = {
    "ops": {"ops", "_cpu", "_cuda", "_version"},
    "nn": {"ops", "nn"},
    "adapters": {"ops", "nn", "adapters"},
    "serving": {"ops", "nn", "adapters", "serving"},
    "integrations": {"ops", "nn", "adapters", "serving", "integrations", "_version"},
    "commands": {"ops", "nn", "adapters", "serving", "integrations", "commands", "_cpu", "_version"},
    "testing": {"ops", "testing", "_ptxsim"},
}
BACKENDS = {"reference", "cpu", "triton", "cuda"}


def imports(path):
    """The dotted names that a file imports from this package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "lora_kernels")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            if (node.module or "").split(".")[0] == "lora_kernels":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    folder = path.relative_to(PACKAGE).parts[0]
    for name in imports(path):
        part = (name.split(".") + [""])[1]
        assert part in MAY_IMPORT[folder], f"{folder} may not import {name}"
        if path.stem in BACKENDS and "ops" in path.parts:
            assert not BACKENDS & set(name.split(".")), f"{path.stem}.py imports another backend: {name}"


def test_no_torch_headers_in_csrc():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)/|\bat::|\btorch::", path.read_text()), path
        bound = re.search(r"#\s*include\s*[<\"](pybind11|Python)", path.read_text())
        assert not bound or path.parent.name == "bindings", f"{path}: only csrc/bindings knows Python"
