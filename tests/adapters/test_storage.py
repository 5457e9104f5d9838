"""A save is one step: other writers, readers beside it, and a kill at any line leave one whole
adapter, and nothing else."""

import contextlib
import json
import os
import random
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_kernels.adapters import AdapterError, LoraConfig, inject_adapter, load_adapter, save_adapter, storage

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.0.lora_B.weight"


def adapter(number, r=2):
    """A model whose configuration and weights both say which save it is."""
    model = nn.Sequential(nn.Linear(6, 5))
    inject_adapter(model, LoraConfig(r=r, lora_alpha=number, target_modules=["0"]))
    with torch.no_grad():
        model[0].lora_B.fill_(number)
    return model


def loaded(folder):
    """The number of the adapter in a folder; fails if its two files are of two saves."""
    model = nn.Sequential(nn.Linear(6, 5))
    load_adapter(model, folder)
    numbers = {model[0].lora_alpha, *model[0].lora_B.flatten().tolist()}
    assert len(numbers) == 1, f"files of two saves: {numbers}"
    return numbers.pop()


def raw(folder):
    """As a reader that does not know of us finds it; None where there is no configuration."""
    if not (folder / CONFIG).exists():
        return None
    numbers = {json.loads((folder / CONFIG).read_text())["lora_alpha"], *load_file(folder / WEIGHTS)[KEY].flatten().tolist()}
    assert len(numbers) == 1, f"files of two saves: {numbers}"
    return numbers.pop()


@contextlib.contextmanager
def process(work, kill=True):
    """Runs `work` in a process of its own, which is killed at the end of the block."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    try:
        yield child
    finally:
        if kill:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def save_for_ever(folder, numbers):
    models = [adapter(n) for n in numbers]
    while True:
        for model in models:
            save_adapter(model, folder)


@pytest.fixture(params=["exchange", "inside"])
def folder(request, tmp_path, monkeypatch):
    """A folder that can be exchanged whole, and one that cannot."""
    path = tmp_path / "parent" / "adapter"
    if request.param == "inside":
        monkeypatch.setattr(storage, "_exchange", lambda *_: False)
    save_adapter(adapter(1), path)
    (path / "notes.txt").write_text("mine")
    (path / "link").symlink_to("notes.txt")
    return path


def assert_clean(folder):
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, "link", "notes.txt"]
    assert os.listdir(folder.parent) == ["adapter"]
    assert (folder / "link").read_text() == "mine"


def writers_at_once(folder, rounds):
    pairs = [adapter(n) for n in (2, 3)], [adapter(n) for n in (4, 5)]
    for _ in range(rounds):
        ready, go = os.pipe()

        def work(models, ready=ready, go=go):
            os.close(go)
            os.read(ready, 1)
            for model in models:
                save_adapter(model, folder)

        with process(lambda: work(pairs[0]), kill=False), process(lambda: work(pairs[1]), kill=False):
            os.close(ready)
            os.close(go)
        assert loaded(folder) == raw(folder)
        assert raw(folder) in (3, 5)
        assert_clean(folder)


def test_two_processes_that_save_at_once_leave_one_of_the_two(folder):
    writers_at_once(folder, 12)


@pytest.mark.slow
def test_two_processes_that_save_at_once_many_times(folder):
    writers_at_once(folder, 300)


def reads(folder, seconds):
    with process(lambda: save_for_ever(folder, (2, 3))), process(lambda: save_for_ever(folder, (4, 5))):
        found, end = set(), time.monotonic() + seconds
        while time.monotonic() < end:
            found.add(loaded(folder))
    assert len(found) > 1


def test_a_reader_beside_two_writers_sees_whole_adapters(folder):
    reads(folder, 1.0)


@pytest.mark.slow
def test_a_reader_beside_two_writers_for_long(folder):
    reads(folder, 60.0)


def kills(folder, rounds):
    generator, missing = random.Random(0), 0
    for _ in range(rounds):
        with process(lambda: save_for_ever(folder, (2, 3))):
            time.sleep(0.02 + 0.03 * generator.random())
        missing += raw(folder) is None
        assert loaded(folder) in (1, 2, 3)
    save_adapter(adapter(1), folder)
    assert_clean(folder)
    return missing


def test_a_killed_writer_leaves_a_whole_adapter(folder):
    missing = kills(folder, 20)
    assert not missing or storage._exchange.__name__ == "<lambda>"


@pytest.mark.slow
def test_a_writer_that_is_killed_many_times(folder):
    kills(folder, 500)


def stopped_at(line, work, stop):
    """Runs `work` until it has come to so many lines of storage.py; whether it came to the end."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        # Python takes a signal after calls alone, so never between the lines of _Descriptor.close
        if frame.f_code.co_filename != storage.__file__ or frame.f_code.co_name == "close":
            return None
        seen += event == "line"
        if event == "line" and seen == line:
            stop()
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return seen < line


def test_a_kill_at_any_line_leaves_the_old_adapter_or_the_new(folder):
    models, line, ended, found = [adapter(2), adapter(3)], 0, False, []
    exchanged = storage._exchange.__name__ != "<lambda>"
    while not ended:
        line += 1
        child = os.fork()
        if not child:
            code = 1
            try:
                code = 7 if stopped_at(line, lambda at=line: save_adapter(models[at % 2], folder), lambda: os._exit(0)) else 1
            finally:
                os._exit(code)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        found.append((loaded(folder), 3 if line % 2 else 2))
        # inside a folder, a reader that does not know of us may find the old one until all is moved
        assert raw(folder) == found[-1][0] or not exchanged
        assert set(os.listdir(folder)) - {storage._STAGE, storage._SAVED} <= {CONFIG, WEIGHTS, "link", "notes.txt"}
        if line % 7 == 0:
            save_adapter(adapter(1), folder)
            assert_clean(folder)
    assert line > 60
    assert {new == number for number, new in found} == {True, False}
    save_adapter(adapter(1), folder)
    assert_clean(folder)


def test_ctrl_c_at_any_line_of_a_save_leaves_a_whole_adapter(folder):
    def interrupt():
        raise KeyboardInterrupt

    models, line, ended = [adapter(2), adapter(3)], 0, False
    while not ended:
        line += 1
        with contextlib.suppress(KeyboardInterrupt):
            ended = stopped_at(line, lambda at=line: save_adapter(models[at % 2], folder), interrupt)
        assert loaded(folder) in (1, 2, 3)
    assert line > 60
    save_adapter(adapter(1), folder)
    assert_clean(folder)


def test_what_else_a_folder_holds_stays_as_it_was(folder):
    (folder / "runs").mkdir()
    (folder / "runs" / "events").write_text("kept")
    os.chmod(folder, 0o750)
    notes, runs = (os.stat(folder / name).st_ino for name in ("notes.txt", "runs"))
    save_adapter(adapter(4), folder)
    assert loaded(folder) == 4
    assert (os.stat(folder / "notes.txt").st_ino, os.stat(folder / "runs").st_ino) == (notes, runs)
    assert (folder / "runs" / "events").read_text() == "kept"
    (folder / "runs" / "events").unlink()
    (folder / "runs").rmdir()
    save_adapter(adapter(5), folder)
    assert os.stat(folder / "notes.txt").st_ino == notes
    assert os.stat(folder).st_mode & 0o777 == 0o750
    assert_clean(folder)


def test_the_working_folder_of_the_process_is_not_exchanged(folder, monkeypatch):
    monkeypatch.chdir(folder)
    save_adapter(adapter(4), ".")
    assert loaded(folder) == 4
    assert sorted(os.listdir(".")) == sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, "link", "notes.txt"]


def test_a_link_to_a_folder_is_followed(folder, tmp_path):
    (tmp_path / "latest").symlink_to(folder, target_is_directory=True)
    save_adapter(adapter(4), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert loaded(folder) == 4
    assert_clean(folder)


def test_a_save_with_the_same_configuration_replaces_the_weights_alone(folder):
    before = os.stat(folder).st_ino, os.stat(folder / CONFIG).st_ino
    model = adapter(1)
    with torch.no_grad():
        model[0].lora_A.fill_(3.0)
    save_adapter(model, folder)
    assert (os.stat(folder).st_ino, os.stat(folder / CONFIG).st_ino) == before
    assert torch.equal(load_file(folder / WEIGHTS)["base_model.model.0.lora_A.weight"], torch.full((2, 6), 3.0))
    assert_clean(folder)


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_changes(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    with pytest.raises(IsADirectoryError):
        save_adapter(adapter(4), folder)
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS, "link", "notes.txt"]


def test_a_lock_file_serves_where_folders_cannot_be_locked(folder, monkeypatch):
    locked = []
    original = storage.fcntl.flock

    def nfs(file, flags):
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError("Bad file descriptor")
        locked.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        original(file, flags)

    monkeypatch.setattr(storage.fcntl, "flock", nfs)
    monkeypatch.setattr(storage, "_exchange", lambda *_: False)
    save_adapter(adapter(4), folder)
    assert locked == [storage._LOCK]
    assert loaded(folder) == 4
    assert_clean(folder)


def test_a_folder_that_never_keeps_still_is_an_error(folder, monkeypatch):
    monkeypatch.setattr(os.path, "sameopenfile", lambda *_: False)
    with pytest.raises(AdapterError, match="is written again and again"):
        loaded(folder)
