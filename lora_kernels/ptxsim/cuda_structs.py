"""The fields of the struct that a kernel of CUDA C++ takes, as its source declares them: what a
launch names must be them."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_STRUCT = re.compile(r"\bstruct (\w+) \{(.*?)\n\};", re.DOTALL)
_FIELD = re.compile(r"(?:const )?(\w+)(?:\* ?| )([\w\s*,\[\]]+);")
_CONSTANT = re.compile(r"\bconstexpr int ([^;]+);")
_PARAMETER = re.compile(r"(\w+)\(const __grid_constant__ (?:lk::)?(\w+) p\)")
_MACRO = re.compile(r"#define (\w+)\(([^)]*)\)((?:.*\\\n)*.*)")


@cache
def struct_fields(source: Path, kernel: str) -> tuple[str, ...]:
    """The names in the order of the memory: "x", of a struct within "bias.kind", of an array
    "jobs[0].part".

    Raises:
        ValueError: the source has no such kernel.
    """
    text = "\n".join(_COMMENT.sub("", part) for part in _with_includes(source))
    structs = {name: body for name, body in _STRUCT.findall(text)}
    return tuple(_fields(_struct_of(text, source, kernel), structs, _constants(text)))


def check_fields(source: Path, kernel: str, given: tuple[str, ...]) -> None:
    """Raises TypeError, with both lists, where a launch names other fields than the source, or in
    another order."""
    wanted = struct_fields(source, kernel)
    if given != wanted:
        raise TypeError(f"{kernel}: its struct in {source.name} has the fields {' '.join(wanted)}, found {' '.join(given)}")


def _with_includes(source: Path, seen: frozenset[Path] = frozenset()) -> Iterator[str]:
    text = source.read_text(encoding="utf-8")
    for name in re.findall(r'#include "([^"]+)"', text):
        if (path := (source.parent / name).resolve()) not in seen:
            yield from _with_includes(path, seen | {source.resolve()})
    yield text


def _struct_of(text: str, source: Path, kernel: str) -> str:
    for name, struct in _PARAMETER.findall(text):
        if name == kernel:
            return str(struct)
    for macro, parameters, body in _MACRO.findall(text):
        names = [each.strip() for each in parameters.split(",")]
        called = re.search(rf"^{macro}\({kernel}(?:,([^)]*))?\)", text, re.MULTILINE)
        if called and (found := _PARAMETER.search(body)):
            given = dict(zip(names, [kernel, *(each.strip() for each in (called[1] or "").split(","))], strict=False))
            return str(given.get(found[2], found[2]))
    raise ValueError(f"{source.name} has no kernel {kernel} with a struct")


def _constants(text: str) -> dict[str, int]:
    """Those of plain numbers."""
    pairs = (each.partition("=") for found in _CONSTANT.findall(text) for each in found.split(","))
    return {name.strip(): int(value) for name, _, value in pairs if value.strip().isdigit()}


def _fields(struct: str, structs: dict[str, str], constants: dict[str, int]) -> Iterator[str]:
    for kind, declared in _FIELD.findall(_without_functions(structs[struct])):
        for each in declared.split(","):
            name = each.strip().lstrip("* ")
            name, _, count = name.partition("[")
            count = count.rstrip("]")
            size = 0 if not count else int(count) if count.isdigit() else constants[count]
            for place in [f"{name}[{i}]" for i in range(size)] if size else [name]:
                yield from ([f"{place}.{inner}" for inner in _fields(kind, structs, constants)] if kind in structs else [place])


def _without_functions(body: str) -> str:
    while (start := body.find("__device__")) >= 0:
        depth, end = 0, body.index("{", start)
        while depth or body[end] == "{":
            depth += {"{": 1, "}": -1}.get(body[end], 0)
            end += 1
            if not depth:
                break
        body = body[:start] + body[end:]
    return body
