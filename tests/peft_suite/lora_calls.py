"""A pytest plugin for PEFT's own tests: `fuse` after each injection, and how each call of a LoRA
layer ran.

A call counts if it had arithmetic to do: the layer has an active adapter, or one that
`adapter_names=` asks for, neither disabled nor merged, and the call did not raise. It was fast if
PEFT's forward of that layer did not run in it. This module must import without this repository's
folder `tests`, since PEFT's tests are in a package of that name.
"""

import contextlib
import json
import os
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import errors
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner

import lora_kernels
from lora_kernels.integrations import peft as integration

FAST = "fast"
NO_FUSE = "LK_SUITE_STOCK"
"""Set: nothing is fused, and nothing counted."""
OUT = "LK_SUITE_OUT"
"""The folder of the counts and of the names of failed tests, a file for each process."""
_BASE = "__base__"
_OFFLINE = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
_calls: Counter[str] = Counter()
_failed: list[str] = []
_running: list["_Call"] = []


class _Call:
    """One call of a layer, on a stack of those under way."""

    def __init__(self, layer):
        self.layer, self.stock = layer, False


def has_arithmetic(layer, kwargs):
    """Whether an adapter takes part in the layer's next call."""
    if layer.disable_adapters or layer.merged:
        return False
    held = {name for holder in layer.adapter_layer_names for name in getattr(layer, holder, ())}
    wanted = kwargs.get("adapter_names")
    return any(name in held for name in (wanted if wanted is not None else layer.active_adapters))


def reason_of(layer, before):
    """Why PEFT's forward ran: what the layer has counted since, or why its class is PEFT's."""
    new = Counter(integration.fallbacks(layer)) - before
    if new:
        return next(iter(new))
    if isinstance(layer, integration.FUSED):
        return f"{type(layer).__name__} ran PEFT's forward and counted no reason"
    return integration.class_refusal(layer) or "it came into being past the injection, and nobody called fuse"


def counted(forward, is_stock):
    """`forward` of a class of LoRA layers, PEFT's own or a fused one; counts the outermost
    calls."""

    def wrapper(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        if _running and _running[-1].layer is self:
            _running[-1].stock |= is_stock
            return forward(self, *args, **kwargs)
        counts, before = has_arithmetic(self, kwargs), Counter(integration.fallbacks(self))
        call = _Call(self)
        call.stock = is_stock
        _running.append(call)
        try:
            result = forward(self, *args, **kwargs)
        finally:
            _running.pop()
        if counts:
            _calls[reason_of(self, before) if call.stock else FAST] += 1
        return result

    return wrapper


def subclasses(cls):
    """A class and all that inherit from it."""
    return {cls}.union(*(subclasses(each) for each in cls.__subclasses__()))


def count_calls():
    """Wraps the forward of every class of LoRA layers."""
    for cls in subclasses(LoraLayer):
        if "forward" in vars(cls) and cls.__module__.startswith(("peft.tuners.lora.", "lora_kernels.")):
            cls.forward = counted(vars(cls)["forward"], cls.__module__.startswith("peft."))


def fuse_after_injection():
    """Every way to an adapter leads through BaseTuner.inject_adapter."""
    inject = BaseTuner.inject_adapter

    def inject_and_fuse(self, model, *args, **kwargs):
        result = inject(self, model, *args, **kwargs)
        if integration.lora_layers(model):
            lora_kernels.fuse(model)
        return result

    BaseTuner.inject_adapter = inject_and_fuse


def methods_of(item):
    """The configuration classes among a test's parameters."""
    values = getattr(item, "callspec", None) and item.callspec.params.values()
    return [value for value in values or () if isinstance(value, type) and issubclass(value, peft.PeftConfig)]


def pytest_configure(config):
    import tests.testing_utils

    # it turns the network on for a while; the models of the hub are not there anyway
    tests.testing_utils.hub_online_once = lambda _: contextlib.nullcontext()
    if not os.environ.get(NO_FUSE):
        count_calls()
        fuse_after_injection()


def pytest_collection_modifyitems(config, items):
    other = [item for item in items if (found := methods_of(item)) and peft.LoraConfig not in found]
    config.hook.pytest_deselected(items=other)
    left = set(other)
    items[:] = [item for item in items if item not in left]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo is not None and report.failed and _wants_the_hub(call.excinfo.value):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, "Skipped: it wants a model of the hub")
    if report.failed:
        _failed.append(item.nodeid)
    return report


def _wants_the_hub(error):
    while error is not None:
        if isinstance(error, _OFFLINE):
            return True
        error = error.__cause__ or error.__context__
    return False


def pytest_sessionfinish(session):
    file = Path(os.environ[OUT]) / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.json"
    file.write_text(json.dumps({"calls": _calls, "failed": _failed}), encoding="utf-8")
