"""Bugs planted into CUDA C++. nvcc takes longer for what a file includes than for a kernel, so that
all bugs that a test function plants into one kernel are compiled in one run, each in a namespace of
its own."""

import os
import re
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

OURS = re.compile(r'^#include "(.*)"$', re.MULTILINE)
OTHERS = re.compile(r"^#include <.*>$", re.MULTILINE)
# C linkage, since it knows no namespaces
DROPPED = re.compile(r'^#include .*$|^#pragma once$|extern "C" ', re.MULTILINE)


class Plant(NamedTuple):
    """`new` in the place of `old`, which is there `times` times; nothing if `old` is empty."""

    old: str
    new: str
    times: int = 1


def with_includes(source: Path) -> list[Path]:
    """A file and those of ours that it includes, each behind what it includes itself."""
    found: list[Path] = []

    def add(path: Path) -> None:
        for name in OURS.findall(path.read_text()):
            if (other := Path(os.path.normpath(path.parent / name))) not in found:
                add(other)
        found.append(path)

    add(source)
    return found


def planted(source: Path, plant: Plant, keep: str) -> dict[Path, str] | None:
    """The texts of a file and its includes with a bug, and of the kernels those that `keep`
    matches; None if the bug does not fit."""
    texts = {path: path.read_text() for path in with_includes(source)}
    old, new, times = plant
    if old and not sum(text.count(old) for text in texts.values()) == times > 0:
        return None
    texts = {path: text.replace(old, new) if old else text for path, text in texts.items()}
    texts[source] = re.sub(rf"^LK_\w+\((?!{keep},)[^;{{}}]*?\)$", "", texts[source], flags=re.MULTILINE)
    return texts


def alike(item: pytest.Item) -> tuple[Plant, ...]:
    """What the tests of this run plant that differ from this one in nothing else."""

    def rest(other: pytest.Item) -> dict[str, object]:
        return {name: value for name, value in other.callspec.params.items() if name not in Plant._fields}

    functions = (other for other in item.session.items if getattr(other, "function", None) is item.function)
    params = [other.callspec.params for other in functions if rest(other) == rest(item)]
    return tuple(Plant(*(each[name] for name in Plant._fields if name in each)) for each in params if "old" in each)


@cache
def compiled(source: Path, keep: str, own: Plant, others: tuple[Plant, ...], arch: str) -> str:
    """The PTX of the file with its own bug, where `others` are compiled with it."""
    return _together(source, keep, others if own in others else (own,), arch)[own]


@cache
def _together(source: Path, keep: str, plants: tuple[Plant, ...], arch: str) -> dict[Plant, str]:
    from lora_kernels.ptxsim.nvcc import compile_ptx  # not there without a compiler

    texts = {plant: "\n".join(texts.values()) for plant in plants if (texts := planted(source, plant, keep))}
    heads = dict.fromkeys(head for text in texts.values() for head in OTHERS.findall(text))
    copies = [f"namespace copy{i} {{{DROPPED.sub('', text)}\n}}" for i, text in enumerate(texts.values())]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / source.name
        made.write_text("\n".join([*heads, *copies, ""]))
        head, *entries = re.split(r"(?m)^(?=\.visible \.entry )", compile_ptx(made, arch))
    return {plant: "".join([head, *_named(i, entries)]) for i, plant in enumerate(texts)}


def _named(i: int, entries: list[str]) -> Iterator[str]:
    """The entries of a copy, with the names that they have in the source."""
    for entry in entries:
        name = entry[: entry.index("(")].split()[-1]
        if begin := re.match(rf"_ZN\d+copy{i}(\d+)", name):
            yield entry.replace(name, name[begin.end() : begin.end() + int(begin[1])])
