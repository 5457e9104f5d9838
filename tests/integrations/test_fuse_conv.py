"""PEFT's convolutions: outputs, gradients, steps and state are PEFT's, and what stays PEFT's is
named."""

import copy
import pickle

import peft
import pytest
import torch
from fuse_helpers import errs_as_stock, randomise
from torch import nn

from lora_kernels import fuse, refresh, unfuse
from lora_kernels.integrations.peft import FusedConv1d, FusedConv2d, FusedConv3d, conv

PREFIX = "base_model.model."
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FUSED = {1: FusedConv1d, 2: FusedConv2d, 3: FusedConv3d}
IN, OUT = 6, 10


@pytest.fixture(autouse=True)
def no_layer_is_too_small(monkeypatch):
    monkeypatch.setattr(conv, "dora_gradients_refusal", lambda x, w, magnitude: None)


class Net(nn.Module):
    def __init__(self, dims, options):
        super().__init__()
        self.conv = CONV[dims](IN, OUT, **({"kernel_size": 3} | options))

    def forward(self, x):
        return self.conv(x)


def made(dims=2, dtype=torch.float32, adapter_dtype=True, options=None, **values):
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["conv"]} | values)
    one = peft.get_peft_model(Net(dims, options or {}).to(dtype), config, autocast_adapter_dtype=adapter_dtype)
    fill(one)
    return one


def fill(one):
    randomise(one)
    with torch.no_grad():
        for name, p in one.named_parameters():
            if "magnitude" in name:
                p.mul_(torch.rand(p.shape, generator=torch.Generator().manual_seed(7)) + 0.5)


def image(dims=2, dtype=torch.float32, batch=2, size=5):
    shape = (batch, IN, *range(size, size + dims))
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def results(one, x):
    """The output with gradients and without, and all gradients."""
    one.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with torch.no_grad():
        frozen = one(x)
    x = x.detach().requires_grad_()
    torch.manual_seed(5)
    y = one(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "frozen": frozen, "x": x.grad}
    return found | {n: p.grad for n, p in one.named_parameters() if p.grad is not None}


def right(stock, x, times=3):
    """A fused copy errs as PEFT does, in outputs and all gradients; (copy, its report)."""
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    found, theirs = results(fused, x), results(stock, x)
    assert not report.left and not report.fallbacks() and len(found) > 3
    assert found["y"].dtype is theirs["y"].dtype and found["y"].stride() == theirs["y"].stride()
    if x.dtype is torch.float64:
        torch.testing.assert_close(found, theirs)
    else:
        errs_as_stock(found, theirs, results(copy.deepcopy(stock).double(), x.double()), times)
    return fused, report


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_real_size(form, dtype, use_dora):
    torch.manual_seed(0)
    base = nn.ModuleDict({"conv": nn.Conv2d(64, 96, 3, padding=1)}).to(dtype)
    stock = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=12, target_modules=["conv"], use_dora=use_dora))
    fill(stock)
    x = torch.randn(2, 64, 24, 24, generator=torch.Generator().manual_seed(2)).to(dtype, memory_format=form)
    layer = stock.base_model.model["conv"]
    assert 2 * 96 * 24 * 24 > conv._SMALL
    right(layer, x)


def fused_of(stock):
    fused = copy.deepcopy(stock)
    fuse(fused)
    return fused


OPTIONS = [{}, {"kernel_size": 1}, {"stride": 2, "padding": 1, "bias": False}, {"padding": "same"}]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_windows(dims, options, use_dora):
    fused, report = right(made(dims, options=options, use_dora=use_dora), image(dims))
    assert report.fused == {PREFIX + "conv": "torch"} and type(fused.base_model.model.conv) is FUSED[dims]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("case", ["bfloat16", "bfloat16 alone", "float16", "float16 alone", "float64"])
def test_dtypes(case, use_dora):
    dtype = getattr(torch, case.split()[0])
    stock = made(dtype=dtype, adapter_dtype="alone" not in case, use_dora=use_dora)
    right(stock, image(dtype=dtype))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("options", [{}, {"kernel_size": 1}], ids=str)
@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last(dims, options, use_dora):
    form = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    stock = made(dims, options=options, use_dora=use_dora)
    right(stock, image(dims).to(memory_format=form))
    if dims == 2:
        # PEFT's DoRA raises on such weights
        found = results(fused_of(stock).to(memory_format=form), image().to(memory_format=form))
        wanted = results(copy.deepcopy(stock).double(), image(dtype=torch.float64))
        errs_as_stock(found, results(stock, image()), wanted, 3)


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_draws_pefts_masks(use_dora):
    stock = made(use_dora=use_dora, lora_dropout=0.4)
    for training in (True, False):
        right(stock.train(training), image())
    stock.train().base_model.model.conv.lora_dropout.eval()
    right(stock, image())
    stock.eval().base_model.model.conv.lora_dropout.train()
    right(stock, image())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"kernel_size": 1, "bias": False}, {"groups": 2}], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_lora_bias(dims, options, dtype):
    fused, _ = right(made(dims, dtype, options=options, lora_bias=True), image(dims, dtype))
    assert {"bias"} < {n.split(".")[-1] for n, p in fused.named_parameters() if p.grad is not None}


def test_groups_and_other_layers_options():
    right(made(options={"groups": 2}), image())
    right(made(options={"padding": 1, "padding_mode": "reflect"}), image())
    for options, reason in (({"dilation": 2}, "lora_A and base_layer have different windows"),):
        assert fuse(made(options=options)).left == {PREFIX + "conv": reason}
    left = fuse(made(options={"padding": 1, "padding_mode": "reflect"}, use_dora=True)).left[PREFIX + "conv"]
    assert left.startswith("base_layer is Conv2d") and "reflect" in left


@pytest.mark.parametrize("options", [{}, {"padding": 1, "stride": 2}, {"kernel_size": 1, "bias": False}], ids=str)
@pytest.mark.parametrize("case", ["float32", "bfloat16", "float64", "dropout"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dora_of_grouped_convolutions(dims, case, options):
    """Its Δ in PEFT has B's numbers as [out / groups, r]."""
    dtype = torch.float32 if case == "dropout" else getattr(torch, case)
    stock = made(dims, dtype, options={"groups": 2} | options, use_dora=True, lora_dropout=0.4 if case == "dropout" else 0.0)
    right(stock.train(), image(dims, dtype))
    right(stock.eval(), image(dims, dtype))


def test_shapes_that_are_pefts_and_empty_ones():
    stock = made()
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    torch.testing.assert_close(fused(image()[0]), stock(image()[0]))
    assert report.fallbacks() == {PREFIX + "conv": {"the input has 3 dimensions": 1}}
    assert fused(image(batch=0)).shape == stock(image(batch=0)).shape
    found, theirs = (results(one, image().transpose(2, 3)) for one in (fused, stock))
    torch.testing.assert_close(found, theirs)


def test_which_gradients_of_dora_are_pefts(monkeypatch):
    monkeypatch.undo()
    small = "gradients of DoRA on a small convolution cost PEFT less"
    for stock, x, reason in (
        (made(use_dora=True), image(), small),
        (made(use_dora=True), image(batch=1, size=160), None),
        (made(use_dora=True, options={"kernel_size": 24}), image(size=25), None),
        (made(dtype=torch.bfloat16, adapter_dtype=False, use_dora=True), image(dtype=torch.bfloat16, size=160),
         "gradients of a 16-bit magnitude cost PEFT less"),
    ):  # fmt: skip
        fused = copy.deepcopy(stock)
        report = fuse(fused)
        with torch.no_grad():
            fused(x)
        assert report.fallbacks() == {}
        y, wanted = fused(x), stock(x)
        assert report.fallbacks() == ({PREFIX + "conv": {reason: 1}} if reason else {})
        assert torch.equal(y, wanted) or not reason


def test_several_adapters_and_their_states():
    stock = made()
    stock.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=2, use_rslora=True, target_modules=["conv"]))
    fill(stock)
    stock.base_model.set_adapter(["default", "other"])
    fused, report = right(stock, image())
    for change in (
        lambda one: one.base_model.set_adapter("other"),
        lambda one: one.base_model.model.conv.scale_layer(3.0),
        lambda one: one.merge_adapter(),
        lambda one: one.unmerge_adapter(),
        lambda one: one.base_model.disable_adapter_layers(),
    ):
        change(stock), change(fused)
        torch.testing.assert_close(fused(image()), stock(image()), rtol=1e-4, atol=1e-5)
    reasons = ["an adapter is merged into the base weight", "the adapters are disabled"]
    assert report.fallbacks() == {PREFIX + "conv": dict.fromkeys(reasons, 1)}


class Doubled(nn.Conv2d):
    """A convolution of the user's, whose output it keeps."""

    def forward(self, x):
        y = super().forward(x) * 2
        self.kept = y.detach()
        return y


def test_an_output_that_others_hold_is_not_changed():
    stock, held = made(), []
    layer = stock.base_model.model.conv.base_layer
    layer.register_forward_hook(lambda module, args, y: held.append((y, y.detach().clone())))
    right(stock, image())
    layer._forward_hooks.clear()
    assert len(held) >= 4 and all(torch.equal(y, before) for y, before in held)
    layer.__class__ = Doubled
    fused, _ = right(stock, image())
    plain = fused.base_model.model.conv.base_layer
    torch.testing.assert_close(plain.kept, nn.functional.conv2d(image(), plain.weight, plain.bias) * 2)
    hooked = made(use_dora=True)
    hooked.base_model.model.conv.base_layer.register_forward_hook(lambda module, args, y: None)
    assert "a hook waits" in fuse(hooked).left[PREFIX + "conv"]


@pytest.mark.parametrize("use_dora", [False, True])
def test_autocast(use_dora):
    stock = made(use_dora=use_dora)
    fused = copy.deepcopy(stock)
    fuse(fused)
    found = []
    for one in (fused, stock):
        x = image().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = one(x)
        y.float().square().sum().backward()
        found.append({"y": y, "x": x.grad} | {n: p.grad for n, p in one.named_parameters() if p.grad is not None})
    exact = copy.deepcopy(stock).double()
    exact.zero_grad()
    x = image(dtype=torch.float64).requires_grad_()
    y = exact(x)
    y.square().sum().backward()
    wanted = {"y": y, "x": x.grad} | {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    errs_as_stock(*({n: t.detach() for n, t in each.items()} for each in (*found, wanted)), times=3)


def test_the_norm_is_kept_and_no_second_convolution_runs(monkeypatch):
    stock = made(use_dora=True)
    fused = copy.deepcopy(stock)
    fuse(fused)
    convolve, shapes = torch.nn.functional.conv2d, []
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda x, w, *rest: shapes.append(w.shape[0]) or convolve(x, w, *rest))
    for one in (stock, fused):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            one(image()).square().sum().backward()
            optimizer.step()
        shapes.clear()
        with torch.no_grad():
            one(image())
    assert shapes == [OUT, 4]
    monkeypatch.undo()
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), stock(image()))
        for one in (stock, fused):
            one.base_model.model.conv.base_layer.weight.mul_(-2)
        torch.testing.assert_close(fused(image()), stock(image()))
        for one in (stock, fused):
            one.base_model.model.conv.base_layer.weight.data[1].mul_(3)
        refresh(fused)
        torch.testing.assert_close(fused(image()), stock(image()))


def test_copies_pickles_and_unfuse():
    stock = made(use_dora=True)
    fused, _ = right(stock, image())
    for one in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(one.base_model.model.conv) is FusedConv2d
        torch.testing.assert_close(one(image()), stock(image()))
    assert fused.state_dict().keys() == stock.state_dict().keys()
    unfuse(fused)
    assert type(fused.base_model.model.conv) is type(stock.base_model.model.conv)
    assert torch.equal(fused(image()), stock(image()))


@pytest.mark.parametrize("use_dora", [False, True])
def test_second_derivatives_transforms_and_compile(use_dora):
    stock = made(use_dora=use_dora)
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    found = []
    for one in (fused, stock):
        x = image().requires_grad_()
        layer = one.base_model.model.conv
        (g,) = torch.autograd.grad(one(x).tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), [layer.lora_B["default"].weight, layer.lora_A["default"].weight, x]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(fused)(image()[None])[0], stock(image()))
    assert sum(report.fallbacks()[PREFIX + "conv"].values()) == 1
    torch.testing.assert_close(torch.compile(fused, backend="eager", fullgraph=True)(image()), stock(image()))


def test_adapters_on_meta():
    config = peft.LoraConfig(r=4, target_modules=["conv"])
    one = peft.get_peft_model(Net(2, {}), config, low_cpu_mem_usage=True)
    assert "meta device" in fuse(one).left[PREFIX + "conv"]
