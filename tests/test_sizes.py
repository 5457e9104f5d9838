"""A file has at most 400 lines, a Triton kernel 120."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "csrc", "examples", "lora_kernels", "tests")
SUFFIXES = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_files(folder):
    sizes = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES
    }  # fmt: skip
    assert sizes
    assert not {name: size for name, size in sizes.items() if size > 400}


def test_kernels():
    kernels = {
        f"{path.name}:{node.name}": node.end_lineno - node.lineno + 1
        for path in (ROOT / "lora_kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    }
    assert len(kernels) > 20
    assert not {name: size for name, size in kernels.items() if size > 120}
