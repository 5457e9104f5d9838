"""Two threads in one module at once: every result has the bits that one thread alone gives."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from fuse_helpers import model, pair
from peft.tuners.lora.layer import Linear
from torch import nn

from lora_kernels import fuse
from lora_kernels.nn import DoRALinear, LoRALinear

THREADS, CALLS = 2, 60


def fused(**values):
    one = model(net=lambda: nn.Sequential(nn.Linear(96, 128)), target_modules=["0"], r=8, **values)
    assert len(fuse(one, strict=True).fused) == 1
    return one.base_model.model[0]


def ours(cls):
    torch.manual_seed(0)
    layer = cls(96, 128, r=8, lora_alpha=12)
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


MODULES = {
    "fused lora": fused,
    "fused dora": lambda: fused(use_dora=True),
    "fused, left to PEFT": lambda: fused(use_dora=True).requires_grad_(True),
    "LoRALinear": lambda: ours(LoRALinear),
    "DoRALinear": lambda: ours(DoRALinear),
}
modules = pytest.mark.parametrize("kind", MODULES)


def inputs(number, requires_grad=False):
    """Another number of rows each time, so that threads sharing a buffer would see another's shape
    or values."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1 + 7 * (number % 9), 96, generator=generator).requires_grad_(requires_grad)


def in_threads(work):
    """work(thread, number) for every number in every thread, all starting at once: the results, by
    thread."""
    start = Barrier(THREADS)

    def run(thread):
        start.wait()
        return [work(thread, number) for number in range(CALLS)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@modules
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_forward_of_one_module(kind, grad):
    layer = MODULES[kind]()

    def call(thread, number):
        with torch.set_grad_enabled(grad):
            # the threads are not at the same input
            return layer(inputs((number * (thread + 1)) % CALLS)).detach()

    expected = [[call(thread, number) for number in range(CALLS)] for thread in range(THREADS)]
    layer = MODULES[kind]()  # one that has kept nothing yet
    for found, right in zip(in_threads(call), expected, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(found, right, strict=True))


@pytest.mark.parametrize("kind", ["fused dora", "DoRALinear"])
def test_one_thread_trains_while_another_evaluates(kind):
    """Without gradients DoRA's norm is kept between calls, with gradients it is not."""
    layer = MODULES[kind]()

    def call(thread, number):
        with torch.set_grad_enabled(thread == 0):
            return layer(inputs(number)).detach()

    right = [call(0, number) for number in range(CALLS)]
    for found in in_threads(call):
        assert all(torch.equal(one, two) for one, two in zip(found, right, strict=True))


@modules
@pytest.mark.parametrize("shared", [False, True], ids=["copies", "one module"])
def test_forward_and_backward(kind, shared):
    layer = MODULES[kind]()
    copies = [layer] * THREADS if shared else [copy.deepcopy(layer) for _ in range(THREADS)]

    def step(thread, number):
        one = copies[thread]
        x = inputs(number + thread, requires_grad=True)
        y = one(x)
        return torch.autograd.grad(y.square().sum(), [x, *(p for p in one.parameters() if p.requires_grad)])

    right = [[step(thread, number) for number in range(CALLS)] for thread in range(THREADS)]
    for found, expected in zip(in_threads(step), right, strict=True):
        for grads, wanted in zip(found, expected, strict=True):
            assert len(grads) >= 3 and all(torch.equal(one, two) for one, two in zip(grads, wanted, strict=True))


def test_two_threads_with_adapters_of_their_own_on_one_base():
    """Copies that share the base weight, as a server of several adapters has them."""
    layer = fused(use_dora=True)
    base = layer.base_layer.weight
    copies = [copy.deepcopy(layer, {id(base): base}) for _ in range(THREADS)]
    with torch.no_grad():
        for number, one in enumerate(copies):
            assert one.base_layer.weight is base
            one.lora_B["default"].weight.mul_(number + 2)

        def call(thread, number):
            return copies[thread](inputs(number)).detach()

        right = [[call(thread, number) for number in range(CALLS)] for thread in range(THREADS)]
    for found, expected in zip(in_threads(call), right, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert not torch.equal(right[0][0], right[1][0])


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_thread_amid_a_call_with_hooks(use_dora, monkeypatch):
    """For a call the forwards of hooked inner modules are others: another thread finds their own,
    in them and in PEFT's forward, and its call of the layer waits."""
    stock, one = pair(use_dora=use_dora)
    layer, plain = one.base_model.model.a, stock.base_model.model.a
    inner = ["base_layer", "lora_A.default", "lora_B.default"]
    for name in inner:
        add_hook_to_module(layer.get_submodule(name), AlignDevicesHook(execution_device="cpu"))
    x, others, found = torch.randn(3, 24), torch.randn(5, 24), []
    calls = (plain.base_layer, plain), (layer.base_layer, lambda t: Linear.forward(layer, t))
    wanted, first = [call(others) for call in calls[0]], get_ident()
    own, pool = AlignDevicesHook.pre_forward, ThreadPoolExecutor(2)

    def amid(hook, module, *args, **kwargs):
        if get_ident() == first and module is layer.get_submodule(inner[-1]):
            found.extend(pool.submit(call, others).result() for call in calls[1])
            found.append(pool.submit(layer, others))
        return own(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", amid)
    for _ in range(2):
        torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close([*found[:2], found[2].result()], [*wanted, plain(others)])
        found.clear()
    pool.shutdown()
    assert not any(fuse(one).fallbacks().values()) and fuse(one).left == {}
