"""What each tool sees of each planted bug is what bugs.py says, and none of them sees anything in
the kernels without it."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kernels.ptxsim.nvcc import find_nvcc
from tests.ptxsim import bugs, corpus
from tests.ptxsim.bugs import BUGS
from tests.ptxsim.corpus import CASES, MISSED


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def plain():
    """The verdicts of Triton's own interpreter, from a process of its own: it takes effect where
    triton is imported."""
    command, environment = [sys.executable, "-m", "tests.ptxsim.plain"], {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def needs(case):
    if case.cuda and find_nvcc() is None:
        pytest.skip("nvcc is not installed here (requirements-dev.txt has it for Linux on x86-64)")
    if not case.cuda:
        pytest.importorskip("triton", reason="triton is not installed here (requirements-dev.txt has it for Linux on x86-64)")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("numbers", range(2))
def test_nothing_is_seen_in_the_kernels_as_they_are(name, numbers, request):
    case = dataclasses.replace(CASES[name], numbers=numbers)
    needs(case)
    assert corpus.by_simulator(case) == (MISSED, "")
    if case.interpreted:
        assert corpus.by_mended_interpreter(case) == (MISSED, "")
        assert request.getfixturevalue("plain")["clean"][name] == MISSED


@pytest.mark.parametrize("number", range(len(BUGS)), ids=[f"{bug.kernel}-{bug.what}".replace(" ", "_") for bug in BUGS])
def test_what_each_tool_sees(number, request):
    bug = BUGS[number]
    case = CASES[bug.case]
    needs(case)
    if bug.nth is not None:
        verdict, said = corpus.by_simulator(case, ptx=bug.changed)
    else:
        verdict, said = corpus.by_simulator(case, bug.old, bug.new)
    assert verdict == bug.simulator != MISSED, said
    assert bug.says in said.splitlines()[1 if verdict == corpus.FINDING else 0]
    if bug.interpreted:
        verdict, said = corpus.by_mended_interpreter(case, bug.old, bug.new)
        assert verdict == bug.mended, said
        assert request.getfixturevalue("plain")["bugs"][number] == bug.plain


def test_the_table():
    assert len(BUGS) >= 40
    assert len({(bug.kernel, bug.what) for bug in BUGS}) == len(BUGS)
    assert bugs.PAGE.read_text() == bugs.table(), "python -m tests.ptxsim.bugs writes it anew"


def test_a_bug_that_is_not_planted_shows():
    for old in ("not there", "tl"):
        with pytest.raises(ValueError, match=rf"'{old}' is there \d+ times, not once"):
            corpus.edited("tl.load, tl.store", old, "")
    with pytest.raises(ValueError, match="the PTX has no ldmatrix"):
        dataclasses.replace(BUGS[0], old="ldmatrix", nth=0).changed("ret;")
