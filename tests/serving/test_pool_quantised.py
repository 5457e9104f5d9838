"""Pools over bitsandbytes' layers: against float64 of the numbers that the codes stand for, and
against a layer for each adapter."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels import load_adapter, multi_lora, use_backend
from lora_kernels.nn import LoRALinear
from lora_kernels.serving import AdapterPool, BaseChangedError, serve, unserve
from lora_kernels.testing.tolerances import rms
from tests.nn.quantised_modules import CODES, bnb, dense, module
from tests.ops.quantised import KINDS, make_quantised
from tests.serving.pools import SIZES, pool_of, random_adapter
from tests.serving.served import base, save_all, tokens

NAMES = ["lora", None, "dora", "lora", "wide"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def net(codes, seed=0, **options):
    first, last = (module(codes, *SIZES[name], seed=seed + i, bias=not i, **options) for i, name in enumerate(SIZES))
    return nn.Sequential(first, nn.Tanh(), last)


def adapters():
    return {"lora": random_adapter(1), "dora": random_adapter(2, dora=True), "wide": random_adapter(3, r=16), None: None}


def exact(model, adapter, x):
    """What the model computes with one adapter, in float64."""
    x = x.double()
    for name, layer in model.named_children():
        if name not in SIZES:
            x = layer(x)
            continue
        w, bias = dense(layer).double(), 0 if layer.bias is None else layer.bias.double()
        if adapter is not None:
            f = adapter.factors[name]
            w = w + f.scale * f.b.double() @ f.a.double()
            if f.magnitude is not None:
                w = (f.magnitude.double() / w.norm(dim=1))[:, None] * w
        x = x @ w.T + bias
    return x


def served(codes, **options):
    model = net(codes, **options)
    pool = pool_of(model, pages=8)
    for name, adapter in adapters().items():
        if name is not None:
            pool.load(name, adapter)
    return serve(model, pool), pool


def check(model, plain, names=NAMES, bound=1e-5):
    x = torch.randn(len(names), 24)
    y = model(x, adapters=names)
    for row, name in zip(range(len(names)), names, strict=True):
        wanted = exact(plain, adapters()[name], x[row : row + 1])[0]
        assert rms(y[row].double() - wanted) <= bound * rms(wanted), (name, rms(y[row].double() - wanted), rms(wanted))


@pytest.mark.parametrize("codes", CODES)
def test_a_batch_of_adapters(codes):
    """Each row is its adapter's, on float64 of the codes' numbers; and the same alone."""
    model, pool = served(codes)
    plain = net(codes)
    check(model, plain)
    check(model, plain, [None] * 3)
    x = torch.randn(5, 24)
    y = model(x, adapters=NAMES)
    for row, name in enumerate(NAMES):
        assert torch.equal(model(x[row : row + 1], adapters=[name])[0], y[row])
    assert torch.equal(model(x), model(x, adapters=[None] * 5))
    assert {*model.state_dict()} == {*plain.state_dict()}
    unserve(model)
    assert type(model[0]) is type(plain[0]) and torch.equal(dense(model[0]), dense(plain[0]))
    if codes == "int8":  # of which the library's own forward still runs
        assert rms(model.train()(x) - exact(plain, None, x)) < 1e-5
    serve(model, pool)
    assert torch.equal(model(x, adapters=NAMES), y)


@pytest.mark.parametrize("codes", ["nf4", "int8"])
def test_a_row_as_a_layer_of_its_own(codes):
    model, _ = served(codes)
    x = torch.randn(4, 24)
    for name in ("lora", "wide"):
        alone = net(codes)
        for module_name, f in adapters()[name].factors.items():
            base, r = alone.get_submodule(module_name), len(f.a)
            alone[int(module_name)] = LoRALinear.from_linear(base, r, f.scale * r, init_lora_weights=(f.a, f.b))
        torch.testing.assert_close(model(x, adapters=[name] * 4), alone(x), rtol=1e-5, atol=1e-5)


def test_the_compute_dtype():
    model, pool = served("nf4", compute=torch.bfloat16)
    assert pool.sites["0"].dtype is torch.bfloat16 and pool.sites["0"].slots.a.dtype is torch.bfloat16
    x = torch.randn(3, 24)
    assert model(x, adapters=["dora", "lora", None]).dtype is torch.float32
    check(model, net("nf4"), bound=2e-2)
    half, _ = served("nf4", dtype=torch.bfloat16)
    assert half(x.bfloat16(), adapters=["dora", "lora", None]).dtype is torch.bfloat16


def loaded(model):
    model.load_state_dict({name: t.clone() for name, t in net("nf4", seed=7).state_dict().items()})


def exchanged(model):
    for name in SIZES:
        model.get_submodule(name).weight = net("nf4", seed=7).get_submodule(name).weight


@pytest.mark.parametrize("change", [loaded, exchanged])
@pytest.mark.parametrize("open_batch", [False, True])
def test_gains_follow_the_codes(change, open_batch):
    model, pool = served("nf4")
    x = torch.randn(2, 24)
    with torch.no_grad():
        before = model(x, adapters=["dora", "lora"])
    now = net("nf4", seed=7)
    if open_batch:
        with pool.batch(["dora", "lora"]):
            model(x)
            change(model)
            y = model(x)
    else:
        change(model)
        y = model(x, adapters=["dora", "lora"])
    assert not torch.allclose(y, before, rtol=1e-2)
    if change is exchanged:
        now[0].bias = model[0].bias
    for row, name in enumerate(["dora", "lora"]):
        wanted = exact(now, adapters()[name], x[row : row + 1])[0]
        assert rms(y[row].double() - wanted) <= 1e-5 * rms(wanted)


def test_other_layers_in_the_places_of_coded_ones():
    model, pool = served("nf4")
    unserve(model)
    model[0] = module("nf4", 40, 24)  # as many codes
    with pytest.raises(BaseChangedError, match=r"at 0: the pages are for a weight \[40, 24\], it is \[24, 40\]"):
        pool.batch(["dora"])
    model[0] = nn.Linear(24, 40)
    with pytest.raises(BaseChangedError, match="at 0: its weight was a Params4bit, and is a Parameter"):
        pool.batch(["dora"])
    model[0] = module("nf4", 24, 40, seed=9)
    pool.batch(["dora"]).close()
    serve(model, pool)
    plain = net("nf4")
    plain[0] = module("nf4", 24, 40, seed=9)
    check(model, plain)


def test_codes_that_cannot_be_read_any_more():
    """As those that bitsandbytes has packed for its own inference; until they are what they
    were."""
    model, pool = served("nf4")
    unserve(model)
    weight, packed = model[0].weight, model[0].weight.data.flip(0)
    codes, weight.data, weight.quant_state.packing_format_for_cpu = weight.data, packed, True
    with pytest.raises(BaseChangedError, match="at 0: bitsandbytes has packed the 4-bit weight"):
        pool.batch(["dora"])
    weight.data, weight.quant_state.packing_format_for_cpu = codes, False
    pool.batch(["dora"]).close()
    check(serve(model, pool), net("nf4"))


@pytest.mark.parametrize("codes", ["nf4", "int8"])
def test_unserve_gives_the_module_itself_with_what_was_loaded(codes):
    model = net(codes)
    module = model[0]
    serve(model, pool_of(model, pages=8)).eval()
    other = net(codes, seed=7)
    model.load_state_dict({name: t.clone() for name, t in other.state_dict().items()})
    unserve(model)
    assert model[0] is module and not module.training and torch.equal(dense(module), dense(other[0]))
    if codes == "nf4":
        assert module.quant_state is module.weight.quant_state and module.weight.module is module


def test_what_cannot_be_read():
    lost = module("nf4", 24, 40)
    lost.weight, lost.quant_state = nn.Parameter(lost.weight.data.as_subclass(torch.Tensor), requires_grad=False), None
    with pytest.raises(TypeError, match="AdapterPool: 0: no adapter can be served on this Linear4bit: .* made anew without it"):
        AdapterPool(nn.Sequential(lost), capacity_bytes=1 << 20)
    model = nn.Sequential(bnb.nn.Linear4bit(24, 40))
    with pytest.raises(TypeError, match="AdapterPool: 0: no adapter can be served on this Linear4bit: .* no quant_state"):
        AdapterPool(model, capacity_bytes=1 << 20)
    with pytest.raises(TypeError, match="the 8-bit layer keeps its weight in 16 bits; leave it out"):
        AdapterPool(nn.Sequential(bnb.nn.Linear8bitLt(24, 40)), capacity_bytes=1 << 20)


def test_sizes_are_of_the_compute_dtype():
    size = AdapterPool.sizing(net("nf4", compute=torch.bfloat16), [8], slots=1)
    assert size.bytes_of_page == 8 * 2 * sum(a + b for a, b in SIZES.values())
    assert AdapterPool.sizing(net("int8"), [8], slots=1).bytes_of_page == 2 * size.bytes_of_page


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_multi_lora(kind, backend):
    """As the op on W itself."""
    _, pool = served("nf4")
    slots = pool.sites["0"].slots
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        w, x = make_quantised(kind, 40, 24, 32, dtype), torch.randn(5, 24).to(dtype)
        with pool.batch(NAMES) as batch, use_backend(backend):
            plan = batch.plan(5)
            y, wanted = (multi_lora(x, each, slots, plan) for each in (w, w.dequantise()))
        assert rms((y - wanted).double()) <= bound * rms(wanted.double())
    codes, parts, layout = w.fields()
    torch.library.opcheck(
        torch.ops.lora_kernels.multi_lora_forward.default,
        (x, codes, slots.tensors, *plan.tensors, None, parts, layout),
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_of_transformers(bits, tmp_path):
    """Loaded in codes, with adapters that PEFT trained: each sequence as its adapter alone."""
    transformers = pytest.importorskip("transformers")
    paths, _ = save_all(tmp_path, ["lora", "dora", "patterns"])
    base().save_pretrained(tmp_path / "base")
    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

    def load():
        quantisation = transformers.BitsAndBytesConfig(**options)
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation, device_map="cpu"
        ).eval()

    model = load()
    coded = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    pool = AdapterPool(model, capacity_bytes=8 << 20, slots=4)
    for name, path in paths.items():
        pool.load(name, path)
    names = [*paths, None]
    ids = tokens(len(names))
    with torch.no_grad():
        logits = serve(model, pool)(input_ids=ids, adapters=names).logits
        assert len(coded) == len(pool.sites) - 1  # the head has no codes
        for row, name in enumerate(names):
            alone = load()
            load_adapter(alone, paths[name or "lora"])
            for layer in () if name else (m for m in alone.modules() if isinstance(m, LoRALinear)):
                layer.enable_adapter(False)
            wanted = alone(input_ids=ids[row : row + 1]).logits[0]
            assert rms((logits[row] - wanted).double()) <= 1e-5 * rms(wanted.double())


def test_gradients_through_a_batch():
    """Of an op whose slots learn: those of W itself."""
    _, pool = served("nf4")
    w = make_quantised("nested", 40, 24, 64)
    slots, found = pool.sites["0"].slots, []
    a = slots.a.clone().requires_grad_()
    own = copy.copy(slots)
    object.__setattr__(own, "a", a)
    own.__dict__.pop("tensors", None)
    x = torch.randn(5, 24, requires_grad=True)
    with pool.batch(NAMES) as batch:
        for each in (w, w.dequantise()):
            y = multi_lora(x, each, own, batch.plan(5))
            found.append(torch.autograd.grad(y.square().sum(), [x, a]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
