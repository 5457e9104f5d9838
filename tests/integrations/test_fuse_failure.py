"""A fuse or unfuse that fails leaves the model as it was, to the last attribute."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from fuse_helpers import inputs, model, same
from peft.tuners.lora.layer import MultiheadAttention
from torch import nn

from lora_kernels import fuse, unfuse
from lora_kernels.integrations import peft as ours
from lora_kernels.integrations.peft import classes
from lora_kernels.integrations.report import Survey


def everything(one):
    """What a module holds: its class and every attribute, parameters and hooks by identity."""
    state = {}
    for name, m in one.named_modules():
        for key, value in vars(m).items():
            content = dict(value) if isinstance(value, dict) else value
            # two bound methods of one module are equal, but never the same object
            state[name, key] = content if callable(value) or isinstance(content, dict) else (value, id(value))
        state[name, "class"] = type(m)
    return state


def hooked_model():
    one = model(use_dora=True)
    add_hook_to_module(one.base_model.model.b, ModelHook())
    one.base_model.model.a.register_forward_pre_hook(lambda module, args: None)
    one.base_model.model.a.register_full_backward_hook(lambda module, before, after: None)
    return one


def fails_at(monkeypatch, owner, name, call):
    """Makes the given call of a function, counted from one, raise."""
    wrapped, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt(name)
        return wrapped(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


PLACES = [(classes, "read_state"), (classes, "class_refusal"), (Survey, "add_layer"), (classes, "_set_class")]


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("place", PLACES, ids=lambda p: p[1])
def test_fuse_interrupted_anywhere_changes_nothing(place, call, monkeypatch):
    one = hooked_model()
    expected, before = copy.deepcopy(one)(inputs()), everything(one)
    with monkeypatch.context() as patch:
        calls = fails_at(patch, *place, call)
        with pytest.raises(KeyboardInterrupt):
            fuse(one)
        assert len(calls) >= call
    assert everything(one) == before
    assert torch.equal(one(inputs()), expected)
    assert len(fuse(one).fused) == 2


def test_unfuse_interrupted_changes_nothing(monkeypatch):
    stock, one = hooked_model(), hooked_model()
    fuse(one)
    before = everything(one)
    with monkeypatch.context() as patch:
        fails_at(patch, classes, "_set_class", 2)
        with pytest.raises(KeyboardInterrupt):
            unfuse(one)
    assert everything(one) == before
    same(stock, one, inputs())
    unfuse(one)
    assert everything(one).keys() == everything(stock).keys() and torch.equal(one(inputs()), stock(inputs()))


def test_a_refused_model_that_was_fused_before_stays_fused(monkeypatch):
    """Undoing a second fuse must not undo the first."""
    one = hooked_model()
    fuse(one)
    one.base_model.model.a.base_layer.register_forward_hook(lambda module, args, out: out)
    before = everything(one)
    with pytest.raises(ValueError, match="1 of 2 left to PEFT; base_model.model.a: a hook waits"):
        fuse(one, strict=True)
    assert everything(one) == before
    with monkeypatch.context() as patch:
        fails_at(patch, classes, "_set_class", 2)
        with pytest.raises(KeyboardInterrupt):
            fuse(one)
    assert everything(one) == before and type(one.base_model.model.a) is ours.FusedLinear


def test_strict_refuses_before_it_changes_anything():
    one = model(target_modules=["a", "b", "words"], net=WithEmbedding)
    one.base_model.model.words.base_layer.max_norm = 1.0
    before = everything(one)
    with pytest.raises(ValueError, match="1 of 3 left to PEFT; base_model.model.words: base_layer has max_norm"):
        fuse(one, strict=True)
    assert everything(one) == before


def test_unfuse_refuses_a_layer_whose_class_was_changed_since():
    one = hooked_model()
    fuse(one)
    one.base_model.model.b.__class__ = type("Wrapped", (ours.FusedLinear,), {})
    before = everything(one)
    with pytest.raises(ValueError, match="base_model.model.b must be a FusedLinear, found its subclass Wrapped"):
        unfuse(one)
    assert everything(one) == before


@pytest.mark.parametrize("use_dora", [False, True])
def test_every_kind_is_changed_or_none(monkeypatch, use_dora):
    names = ["words", "conv1", "conv2", "conv3", "a", "b"]
    # of a parameter PEFT has no DoRA
    parameters = {} if use_dora else {"target_parameters": ["c.weight"]}
    stock = model(target_modules=names, net=EveryKind, use_dora=use_dora, **parameters)
    one, before = copy.deepcopy(stock), {name: type(m) for name, m in stock.named_modules()}
    changed = [f"base_model.model.{name}" for name in (*names, *(["c"] if parameters else ()))]
    # those over quantised layers are there only with bitsandbytes; PEFT's attention gives itself
    # other attributes in each call
    left = [stock for stock, _ in classes.QUANTISED_KINDS] + [MultiheadAttention]
    kinds = [kind for kind in classes.KINDS if kind.stock not in left]
    assert use_dora or len(changed) == len(kinds) + 1, "a kind is not tried"
    ids, state = torch.randint(5, (2, 3)), everything(one)
    for act in (fuse, unfuse):
        for call in range(1, len(changed) + 1):
            with monkeypatch.context() as patch:
                fails_at(patch, classes, "_set_class", call)
                with pytest.raises(KeyboardInterrupt):
                    act(one)
            assert everything(one) == state
            same(stock, one, ids)
        act(one)
        found = {name for name, m in one.named_modules() if type(m) is not before[name]}
        assert found == (set(changed) if act is fuse else set())
        state = everything(one)


class EveryKind(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 8)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(3, 4, 3), nn.Conv2d(4, 6, 1), nn.Conv3d(6, 4, 1)
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, ids):
        x = self.conv2(self.conv1(self.words(ids))[..., None])
        return self.c(self.b(self.a(self.conv3(x[..., None]).flatten(2))))


class WithEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(5, 24), nn.Linear(24, 40), nn.Linear(40, 16)

    def forward(self, ids):
        return self.b(self.a(self.words(ids)))
