"""Calls of layers over bitsandbytes' weights in which tokens have different adapters, and calls of
several threads."""

import copy
import warnings
from threading import Barrier

import peft
import pytest
import torch

from lora_kernels import explain, fuse
from lora_kernels.integrations.peft import linear
from lora_kernels.integrations.peft import quantised as over_quantised
from tests.integrations.fuse_helpers import errs_as_stock, fused_copy, gradients, randomise, worst_error
from tests.integrations.test_fuse_threads import CALLS, THREADS, in_threads

pytest.importorskip("bitsandbytes")
from tests.integrations.bitsandbytes_helpers import KINDS, exact, inputs, model

F32, BF16 = torch.float32, torch.bfloat16
A = "base_model.model.a"
NAMES = ["default", "other", "__base__", "third", "third", "default", "other"]
OFFSETS = [3, None, 5, 0, 2, 1, None]


def layer_a(made):
    return made.get_submodule(A)


def named(kind, compute=F32, others=None, **lora):
    """With three adapters, all of which learn, in eval mode."""
    made = model(kind, compute, nested=kind == "nf4", **lora)
    for name, values in (others or {"other": {"r": 9}, "third": {"r": 3, "use_rslora": True}}).items():
        made.add_adapter(name, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["a", "b"]} | values))
    randomise(made)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.mul_(0.1)
            if "magnitude" in name:
                p.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
            p.requires_grad_("lora" in name)
    return made.eval()


def sequences(length=None, dtype=F32, count=7):
    shape = (count, 128) if length is None else (count, length, 128)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def compare(stock, x, **keywords):
    """Outputs and all gradients, and outputs without gradients, for which nothing is packed."""
    fused, true = fused_copy(stock), exact(stock).train(stock.training)
    found, wanted = (gradients(one, x.to(dtype), **keywords) for one, dtype in ((fused, x.dtype), (true, torch.float64)))
    # of sequences PEFT raises: it changes the library's views in place
    names = [name for name in keywords["adapter_names"] for _ in range(x[..., 0].numel() // len(x))]
    theirs = gradients(stock, x.reshape(-1, x.shape[-1]), adapter_names=names)
    theirs |= {name: theirs[name].view(wanted[name].shape) for name in "yx"}
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in wanted.items()}
    zero = [name for name, t in wanted.items() if not t.any()]
    assert all(not found.pop(name).any() and not theirs.pop(name).any() for name in zero)
    wanted = {name: t for name, t in wanted.items() if name not in zero}
    errs_as_stock(found, theirs, wanted, 2)
    with torch.no_grad():
        y = fused(x, **keywords)
    assert worst_error({"y": y}, {"y": wanted["y"]}) <= 2 * worst_error({"y": theirs["y"]}, {"y": wanted["y"]})
    assert fuse(fused).fallbacks() == {}
    return fused


@pytest.mark.parametrize("length", [None, 5])
@pytest.mark.parametrize(
    "kind,compute,dtype", [("nf4", F32, F32), ("nf4", BF16, F32), ("fp4", BF16, BF16), ("int8", None, BF16)]
)
@pytest.mark.parametrize("names", [NAMES, ["other"] * 7, NAMES[:3]], ids=["mixed", "one", "few"])
def test_adapter_names(kind, compute, dtype, length, names):
    fused = compare(named(kind, compute), sequences(length, dtype, len(names)), adapter_names=names)
    with torch.no_grad():
        decisions = explain(layer_a(fused), sequences(length, dtype, len(names)), adapter_names=names).decisions
    assert {d.op for d in decisions} == {"lora_linear_forward" if len({*names}) == 1 else "multi_lora_forward"}


@pytest.mark.parametrize("mix", ["biases", "layers", "dropout"])
def test_adapter_names_of_adapters_that_differ(mix):
    lora = {"biases": {"lora_bias": True}, "layers": {}, "dropout": {"lora_dropout": 0.5}}[mix]
    others = {"biases": {"r": 2}, "layers": {"target_modules": ["b"]}, "dropout": {"lora_dropout": 0.5}}[mix]
    stock = named("nf4", F32, {"other": others, "third": {}}, **lora)
    if mix != "dropout":
        compare(stock, sequences(3), adapter_names=NAMES)
        return
    fused, found = fused_copy(stock.train()), []
    for one in (stock, fused):
        torch.manual_seed(0)
        found.append(gradients(layer_a(one), sequences(), adapter_names=["default"] * 4 + ["__base__"] * 3))
    assert worst_error(*found) < 1e-5 and fuse(fused).fallbacks() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_without_an_adapter_leave_the_codes_alone(kind):
    """bitsandbytes' own forward would pack them here, with rounded scales."""
    stock = named(kind, F32, {"other": {"target_modules": ["b"]}})
    fused, true = fused_copy(stock), exact(stock).eval()
    codes, x = layer_a(fused).base_layer.weight.data.clone(), sequences(3)
    with torch.no_grad():
        for names in (["__base__"] * 7, ["other"] * 7):
            y, wanted = (one(x.to(dtype), adapter_names=names) for one, dtype in ((fused, F32), (true, torch.float64)))
            assert worst_error({"y": y}, {"y": wanted}) < 1e-5
    assert torch.equal(layer_a(fused).base_layer.weight.data, codes) and fuse(fused).fallbacks() == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_dora_which_peft_refuses(kind, grad):
    dora = {"use_dora": True}
    stock = named(kind, F32, {"other": {"r": 3, **dora}, "third": {}}, **dora)
    layer, plain, x = layer_a(fused_copy(stock)), layer_a(exact(stock)), sequences(3)
    if grad:
        found = gradients(layer, x, adapter_names=NAMES)
    else:
        with torch.no_grad():
            found = {"y": layer(x, adapter_names=NAMES)}
    leaf, wanted = x.double().requires_grad_(), []
    for i, name in enumerate(NAMES):
        plain.set_adapter("default" if name == "__base__" else name)
        wanted.append((plain.base_layer if name == "__base__" else plain)(leaf[i : i + 1]))
    for name, p in plain.named_parameters():
        p.requires_grad_("lora" in name)
    wanted = {"y": torch.cat(wanted)}
    if grad:
        (wanted["y"] * torch.randn(x.shape[:-1] + (64,), generator=torch.Generator().manual_seed(5))).sum().backward()
        wanted |= {"x": leaf.grad} | {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        wanted = {name: found[name] * 0 + t for name, t in wanted.items()}
    assert worst_error(found, {name: t.detach() for name, t in wanted.items()}) < 1e-5


@pytest.mark.parametrize("kind,compute", [("nf4", F32), ("int8", None)])
def test_alora(kind, compute):
    activated = {"alora_invocation_tokens": [7, 9], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = named(kind, compute, {"third": {"r": 3}}, **activated)
    fused, true = fused_copy(stock), exact(stock)
    x, names = sequences(6), ["third", "default"] * 3 + ["__base__"]
    for given in ({}, {"adapter_names": names}):
        given["alora_offsets"] = OFFSETS
        found, wanted = (gradients(layer_a(one), x.to(dtype), **given) for one, dtype in ((fused, F32), (true, torch.float64)))
        assert found.keys() == wanted.keys() and worst_error(found, wanted) < 1e-5
        with torch.no_grad():
            y = layer_a(fused)(x, **given)
        assert worst_error({"y": y}, {"y": wanted["y"]}) < 1e-5
    assert fuse(fused).fallbacks() == {}


def test_gradients_of_gradients():
    stock = named("nf4")
    fused = fused_copy(stock)

    def twice(one):
        x = sequences().requires_grad_()
        (dx,) = torch.autograd.grad(one(x, adapter_names=NAMES).square().sum(), x, create_graph=True)
        one.zero_grad(set_to_none=True)
        dx.square().sum().backward()
        return {"x": x.grad} | {n: p.grad for n, p in one.named_parameters() if p.grad is not None}

    true = twice(exact(stock).eval().float())
    assert worst_error(twice(fused), true) < 1e-4


def test_an_autocast_batch():
    stock = named("nf4", BF16)
    fused, x = fused_copy(stock), sequences(3)
    with torch.autocast("cpu", BF16):
        found, wanted = (one(x.requires_grad_(), adapter_names=NAMES) for one in (fused, stock))
    assert found.dtype is wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=3e-2, atol=3e-2)
    assert fuse(fused).fallbacks() == {}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dora", [False, True])
def test_threads_of_two_dtypes(dora, grad, monkeypatch):
    """An int8 base computes in the dtype of each call's input; here both are known before either
    runs."""
    stock = model("int8", use_dora=dora)

    def call(layer, thread, number):
        x = inputs((F32, BF16)[thread], 1 + number % 5)
        with torch.set_grad_enabled(grad):
            return layer(x).detach()

    layer = layer_a(fused_copy(stock))
    wanted = [[call(layer, thread, number) for number in range(CALLS)] for thread in range(THREADS)]
    layer, both = layer_a(fused_copy(stock)), Barrier(THREADS)

    def run_after_both(*arguments):
        both.wait(30)
        return linear.run_fused(*arguments)

    monkeypatch.setattr(over_quantised, "run_fused", run_after_both)
    for found, right in zip(in_threads(lambda *which: call(layer, *which)), wanted, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(found, right, strict=True))
    assert linear.fallbacks(layer) == {}


def test_dropout_of_a_second_dora_forms_no_weight():
    """Its base product is one of codes, in both directions."""
    lora = {"lora_dropout": 0.5, "use_dora": True}
    stock = model("nf4", **lora)
    stock.add_adapter("other", peft.LoraConfig(r=3, target_modules=["a"], **lora))
    randomise(stock)
    stock.base_model.set_adapter(["default", "other"])
    fused, plain, found = fused_copy(stock).train(), exact(stock).float(), []
    plain.base_model.set_adapter(["default", "other"])
    fuse(plain.train())
    for one in (fused, plain):
        torch.manual_seed(3)
        found.append(gradients(one, inputs()))
    assert worst_error(*found) < 1e-5
    decisions = explain(layer_a(fused), inputs()).decisions
    assert "dequantise" not in {d.op for d in decisions} and copy.deepcopy(linear.fallbacks(layer_a(fused))) == {}
