import os
import re
from pathlib import Path

import pytest

from lora_kernels.ops import launch
from lora_kernels.testing import poisoned


@pytest.fixture(autouse=True)
def poisoned_memory():
    with poisoned():
        yield
    assert not any(tickets.any() for tickets in launch._tickets.values()), "a launch left its tickets other than zero"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Puts a bug into a file of CUDA C++ or into what it includes, and of its kernels keeps one,
    which is quicker to compile; with nothing to replace the kernel is as it was."""
    monkeypatch.setattr(launch, "_tickets", {})  # a bug may leave them as they must not be

    def plant(source, old, new, keep, times=1):
        texts = {p.relative_to(launch.CSRC): p.read_text() for p in launch.CSRC.rglob("*") if p.suffix in (".cu", ".cuh", ".h")}
        named = [Path(source)]
        for path in named:  # and what it includes
            found = re.findall(r'#include "(.*)"', texts[path])
            named += [p for name in found if (p := Path(os.path.normpath(path.parent / name))) not in named]
        assert not old or sum(texts[path].count(old) for path in named) == times > 0, old
        for path in named:
            texts[path] = texts[path].replace(old, new) if old else texts[path]
            if str(path) == source:
                texts[path] = re.sub(rf"^LK_\w+\((?!{keep},)[^;{{}}]*?\)$", "", texts[path], flags=re.MULTILINE)
        for path, text in texts.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text)
        monkeypatch.setattr(launch, "CSRC", tmp_path)

    plant.source = launch.CSRC
    return plant
