"""Ctrl-C at any line of inject_adapter and load_adapter leaves the model as it was, or complete."""

import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_kernels
from lora_kernels.adapters import LoraConfig, inject_adapter, load_adapter, save_adapter
from lora_kernels.adapters.interrupts import uninterrupted

OURS = str(Path(lora_kernels.__file__).parent)
CONFIG = {"target_modules": ["0", "2"], "r": 2, "bias": "all", "modules_to_save": ["3"], "init_lora_weights": False}


@pytest.fixture(autouse=True)
def default_handler():
    """A shell's background job begins with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 2))
    model[2].bias.requires_grad_(False)
    return model


def injected(**more):
    model = net()
    inject_adapter(model, LoraConfig(**{**CONFIG, **more}))
    return model


def zeroed(**more):
    model = injected(**more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def state(model):
    modules = [(name, type(m)) for name, m in model.named_modules()]
    tensors = [(name, p.requires_grad, p.tolist()) for name, p in model.named_parameters()]
    return modules, tensors, hasattr(model, "_lora_config")


def signalled_at(line, call):
    """Calls and sends the signal of Ctrl-C at so many lines of this package; whether the call came
    to its end, and how many lines there were."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        seen += event == "line"
        if event == "line" and seen == line:
            signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        call()
        ended = True
    except KeyboardInterrupt:
        ended = False
    finally:
        sys.settrace(None)
    # where a step's own end was cut short its handler may stay, and must do what the old one did
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return ended, seen


CALLS = {
    "inject": (net, lambda model, folder: inject_adapter(model, LoraConfig(**CONFIG))),
    "inject pissa": (net, lambda model, folder: inject_adapter(model, LoraConfig(**{**CONFIG, "init_lora_weights": "pissa"}))),
    "load": (net, lambda model, folder: load_adapter(model, folder, is_trainable=True)),
    "load into layers": (zeroed, lambda model, folder: load_adapter(model, folder)),
}


def interrupts(case, folder, stride):
    make, call = CALLS[case]
    save_adapter(injected(), folder)
    model = make()
    before = state(model)
    _, lines = signalled_at(0, lambda: call(model, folder))
    after = state(model)
    assert before != after
    outcomes = {"before": 0, "after": 0}
    for line in [*range(1, lines - 250, stride), *range(max(1, lines - 250), lines + 1, max(1, stride // 8))]:
        model = make()
        ended, _ = signalled_at(line, lambda model=model: call(model, folder))
        found = state(model)
        assert found in (before, after), f"at line {line} of {lines}"
        assert not ended or found == after
        outcomes["before" if found == before else "after"] += 1
    assert outcomes["before"] > 10


@pytest.mark.parametrize("case", CALLS)
def test_ctrl_c_leaves_the_model_as_it_was_or_complete(case, tmp_path):
    interrupts(case, tmp_path, 97)


@pytest.mark.slow
@pytest.mark.parametrize("case", CALLS)
def test_ctrl_c_at_every_line(case, tmp_path):
    interrupts(case, tmp_path, 1)


def test_signals_wait_for_the_end_of_the_step():
    log = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        log.append("went on")
    assert log == ["went on"]
    with pytest.raises(KeyboardInterrupt), uninterrupted() as act:
        signal.raise_signal(signal.SIGINT)
        log.append("before")
        act()
        log.append("not reached")
    assert log == ["went on", "before"]


def test_a_handler_that_does_not_raise_stops_nothing():
    came = []
    old = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with uninterrupted() as act:
            signal.raise_signal(signal.SIGINT)
            assert came == []
            act()
            assert came == [signal.SIGINT]
        assert came == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, old)


def test_other_threads_leave_the_handlers_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with uninterrupted() as act:
            seen.append(signal.getsignal(signal.SIGINT))
            act()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
