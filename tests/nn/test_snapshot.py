"""Layers that one thread calls while another merges, scales or loads them: every result is that of
a state which the layer was in."""

import sys
import threading
import time

import pytest
import torch
from torch import nn

from lora_kernels.nn import DoRALinear, GroupedLinear, LoRAEmbedding, LoRALinear
from lora_kernels.nn.snapshot import changing

SECONDS = 0.5  # before calls were held to one state, 246 of 1500 computed with parts of two


@pytest.fixture(autouse=True)
def quick_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def layer_of(kind, size=96):
    torch.manual_seed(0)
    if kind is LoRAEmbedding:
        layer = kind(size, size, r=8)
        nn.init.normal_(layer.lora_embedding_A)
        nn.init.normal_(layer.lora_embedding_B)
    else:
        layer = kind.from_linear(nn.Linear(size, size), r=8)
        nn.init.normal_(layer.lora_B)
    return layer.requires_grad_(False)


def neither(call, states, change):
    """How many results of `call`, beside a thread that repeats `change`, are of none of `states`;
    and how many calls there were."""
    done, failures = threading.Event(), []

    def changes():
        while not done.is_set():
            try:
                change()
            except Exception as error:
                failures.append(error)

    before, other = sys.getswitchinterval(), threading.Thread(target=changes)
    sys.setswitchinterval(1e-5)
    other.start()
    try:
        end, wrong, calls = time.monotonic() + SECONDS, 0, 0
        while time.monotonic() < end:
            y = call()
            calls += 1
            wrong += not any(torch.allclose(y, each, rtol=1e-4, atol=1e-4) for each in states)
    finally:
        done.set()
        other.join()
        sys.setswitchinterval(before)
    assert not failures
    return wrong, calls


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tokens", [3, 200])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear, LoRAEmbedding])
def test_merging_beside_calls(kind, tokens, grad):
    layer = layer_of(kind).requires_grad_(grad)
    layer.weight.requires_grad_(False)
    x = torch.randint(0, 96, (tokens,)) if kind is LoRAEmbedding else torch.randn(tokens, 96)

    def change():
        layer.merge()
        layer.unmerge()

    wrong, calls = neither(lambda: layer(x).detach(), [layer(x).detach()], change)
    assert wrong == 0 and calls > 10


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_scaling_and_loading_beside_calls(kind):
    layer, x = layer_of(kind), torch.randn(5, 96)
    saved, states = [], []
    for factor in (1.0, -3.0):
        with torch.no_grad():
            for p in (layer.lora_A, layer.lora_B):
                p.mul_(factor)
        saved.append({k: v.clone() for k, v in layer.state_dict().items()})
    for state in saved:
        for factor in (1.0, 2.0):
            layer.load_state_dict(state)
            layer.set_scale(factor)
            states.append(layer(x))
    turn = iter(range(10**9))

    def change():
        i = next(turn)
        layer.load_state_dict(saved[i % 2])
        layer.set_scale(1.0 + (i // 2) % 2)

    wrong, calls = neither(lambda: layer(x), states, change)
    assert wrong == 0 and calls > 10


def test_merging_beside_a_group():
    layers = [layer_of(kind) for kind in (LoRALinear, DoRALinear)]
    group, x = GroupedLinear(layers), torch.randn(7, 96)

    def change():
        for layer in layers:
            layer.merge()
        for layer in layers:
            layer.unmerge()

    wrong, calls = neither(lambda: torch.cat(group(x)), [torch.cat(group(x))], change)
    assert wrong == 0 and calls > 10


def test_changes_within_changes_are_one():
    layer = layer_of(LoRALinear)
    with changing(layer):
        with changing(layer):
            assert layer._changes == 1
        assert layer._changes == 1
    assert layer._changes == 2


def test_an_error_of_the_call_is_raised_as_it_is():
    with pytest.raises(ValueError, match="x must have 96 features"):
        layer_of(LoRALinear)(torch.randn(3, 95))
