"""Imports go one way, those at run time, too: csrc ← ptxsim ← ops ← nn ← adapters ← serving ←
integrations ← commands. Backends never import each other."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_kernels"
MAY_IMPORT = {
    "ptxsim": {"ptxsim", "_ptxsim"},
    "ops": {"ops", "ptxsim", "_cpu", "_cuda", "_version"},
    "nn": {"ops", "nn"},
    "adapters": {"ops", "nn", "adapters"},
    "serving": {"ops", "nn", "adapters", "serving"},
    "integrations": {"ops", "nn", "adapters", "serving", "integrations", "_version"},
    "commands": {"ops", "nn", "adapters", "serving", "integrations", "commands", "_cpu", "_version"},
    "testing": {"ops", "ptxsim", "testing", "_ptxsim"},
}
# which import what they are told: the backends of an op; a kernel, and a folder of configurations
TOLD = {
    "ops/registry.py": 1, "testing/gates/configuration.py": 1, "testing/gates/__main__.py": 1, "testing/tile.py": 1,
}  # fmt: skip
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
        elif _is_dynamic(node) and isinstance(node.args[0], ast.Constant):
            yield node.args[0].value


def _is_dynamic(node):
    called = getattr(node, "func", None)
    return (getattr(called, "attr", None) or getattr(called, "id", None)) in {"import_module", "__import__"}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    folder = path.relative_to(PACKAGE).parts[0]
    for name in imports(path):
        part = (name.split(".") + [""])[1]
        assert part in MAY_IMPORT[folder], f"{folder} may not import {name}"
        if path.stem in BACKENDS and "ops" in path.parts:
            assert not BACKENDS & set(name.split(".")), f"{path.stem}.py imports another backend: {name}"


def test_who_imports_what_it_is_told():
    """Nobody else: what is imported at run time stands in the text, where the test above reads
    it."""
    found = {}
    for path in FILES:
        told = [n for n in ast.walk(ast.parse(path.read_text())) if _is_dynamic(n) and not isinstance(n.args[0], ast.Constant)]
        if told:
            found[path.relative_to(PACKAGE).as_posix()] = len(told)
    assert found == TOLD


def test_contributing_says_the_same():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    order = re.search(r"Imports go one way: ([^;]+);", text)[1].split(" ← ")
    assert order == ["csrc", *(folder for folder in MAY_IMPORT if folder != "testing")]


def test_no_torch_headers_in_csrc():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)/|\bat::|\btorch::", path.read_text()), path
        bound = re.search(r"#\s*include\s*[<\"](pybind11|Python)", path.read_text())
        assert not bound or path.parent.name == "bindings", f"{path}: only csrc/bindings knows Python"
