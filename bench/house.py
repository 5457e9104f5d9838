"""How the source reads, in figures: `python -m bench.house [FOLDER]`. Tests are left out.

Names of functions (of one word and at most six letters), parameters, lengths of files and
functions, docstrings, return types, and the length of sentences in README, docs and docstrings.
"""

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median, quantiles

FOLDERS = ("lora_kernels", "bench", "examples", "setup.py")
SHORT = 6  # letters
LONG = 35  # words of a sentence

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(root: Path) -> list[Path]:
    """The Python files."""
    return sorted(file for name in FOLDERS for file in ([root / name] if name.endswith(".py") else (root / name).rglob("*.py")))


def functions(file: Path) -> Iterator[Function]:
    """Those that a file defines, methods too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def is_short(name: str) -> bool:
    """Whether a name is one word of at most six letters; what Python names is not."""
    plain = name.strip("_")
    return not name.startswith("__") and "_" not in plain and len(plain) <= SHORT


def parameters(function: Function) -> int:
    """How many a function has."""
    a = function.args
    return len([*a.posonlyargs, *a.args, *a.kwonlyargs]) + bool(a.vararg) + bool(a.kwarg)


def markdown_prose(text: str) -> str:
    """Of a Markdown file: its paragraphs and list items, without code, tables, headings, pictures
    and the targets of links."""
    text = re.sub(r"^```.*?^```", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^ {4,}\S.*$|^[|#<!].*$|^---+$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*(?:[-*]|\d+\.)\s", "\n\n", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "CODE", text))


def docstring_prose(text: str) -> str:
    """Of a docstring: without formulas and code, which are indented."""
    return markdown_prose(re.sub(r"^ *(Raises|Shapes):.*$", "\n", text, flags=re.MULTILINE))


def sentences(text: str) -> Iterator[str]:
    """The sentences of prose; a colon and a semicolon end none."""
    for paragraph in re.split(r"\n\s*\n", text):
        yield from (part.strip() for part in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9(`])", " ".join(paragraph.split())) if part)


def too_long(text: str) -> list[str]:
    """The sentences of more than LONG words."""
    return [sentence for sentence in sentences(text) if len(sentence.split()) > LONG]


def last_of(values: Sequence[float], share: int) -> float:
    """A percentile."""
    return quantiles(values, n=100)[share - 1] if len(values) > 1 else values[0]


def summary_lines(root: Path) -> list[str]:
    """The figures, a line each."""
    files = sources(root)
    lines = [len(file.read_text(encoding="utf-8").splitlines()) for file in files]
    all_ = [function for file in files for function in functions(file)]
    names = [f.name for f in all_ if not f.name.startswith("__")]
    lengths = [(f.end_lineno or f.lineno) - f.lineno + 1 for f in all_]
    public = [f for f in all_ if not f.name.startswith("_")]
    docstrings = [text for f in all_ if (text := ast.get_docstring(f))]
    docs = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("**/*.md"))]
    readme = (root / "README.md").read_text(encoding="utf-8")
    long_docs = [s for file in docs if file.exists() for s in too_long(markdown_prose(file.read_text(encoding="utf-8")))]
    long_docstrings = [s for text in docstrings for s in too_long(docstring_prose(text))]
    counts = [parameters(f) for f in all_]
    share = lambda some, of: f"{100 * len(some) / max(1, len(of)):.0f} %"  # noqa: E731
    return [
        f"files {len(files)}, lines {sum(lines)}, median {median(lines):.0f}, longest {max(lines)}",
        f"functions {len(all_)}, lines: median {median(lengths):.0f}, 95 % {last_of(lengths, 95):.0f}, longest {max(lengths)}",
        f"names: {mean(len(n.strip('_')) for n in names):.1f} letters, of one word of at most {SHORT}: "
        f"{share([n for n in names if is_short(n)], names)}",
        f"parameters: 95 % {last_of(counts, 95):.0f}, most {max(counts)}",
        f"public functions with a docstring {share([f for f in public if ast.get_docstring(f)], public)}, "
        f"with a return type {share([f for f in public if f.returns], public)}",
        f"sentences of more than {LONG} words: {len(long_docs)} in README and docs, {len(long_docstrings)} in docstrings",
        f"README: {len(readme.splitlines())} lines, {len(readme.split())} words, {readme.count('![')} pictures",
    ]


def main(arguments: list[str]) -> int:
    """With --long also the sentences, with --short the names."""
    root = Path(next((a for a in arguments if not a.startswith("-")), "."))
    print(*summary_lines(root), sep="\n")
    for file in sources(root):
        for function in functions(file):
            if "--short" in arguments and is_short(function.name):
                print(f"{file}:{function.lineno} {function.name}")
            if "--long" in arguments:
                found = too_long(docstring_prose(ast.get_docstring(function) or ""))
                print(*(f"{file}:{function.lineno} {sentence}" for sentence in found), sep="\n", end="\n" * bool(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
