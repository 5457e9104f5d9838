"""The base under a pool: weights that change, and layers that are replaced."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lora_kernels.ops.multi_lora import multi_lora
from lora_kernels.serving import Adapter, AdapterPool, BaseChangedError, Factors, serve, unserve
from tests.serving.pools import SIZES, alone, net, pool_of, random_adapter


def dora(seed, **options):
    return random_adapter(seed, dora=True, **options)


def served_net():
    model = net()
    pool = pool_of(model)
    pool.load("dora", dora(0)), pool.load("lora", random_adapter(1))
    return serve(model, pool), pool


def other_weights(model):
    torch.manual_seed(9)
    return {name: torch.randn(t.shape) * 0.3 for name, t in model.state_dict().items()}


def in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5).add_(0.1)


def assigned(model):
    model.load_state_dict(other_weights(model), assign=True)


def copied(model):
    model.load_state_dict(other_weights(model))


def one_row(model):
    with torch.no_grad():
        model[2].weight[3] *= 4


def cast_and_back(model):
    """Casts may get the memory of before again, with other numbers in it."""
    model.to(torch.float16).to(torch.float32)


def data_exchanged(model):
    model[0].weight.data = torch.randn(40, 24)


def step_of_an_optimizer(model):
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model(torch.randn(3, 24)).square().sum().backward()
    optimizer.step()
    model.requires_grad_(False)


@pytest.mark.parametrize("change", [in_place, assigned, copied, one_row, cast_and_back, data_exchanged, step_of_an_optimizer])
@pytest.mark.parametrize("when", ["batch", "load", "update"])
def test_gains_follow_the_weights(change, when):
    model, pool = served_net()
    x = torch.randn(3, 24)
    model(x, adapters=["dora", "lora", None])
    change(model)
    now, wanted = net(), {"dora": dora(0), "lora": random_adapter(1), None: None}
    now.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
    if when == "load":
        pool.load("new", dora(2))
        wanted["new"] = dora(2)
    elif when == "update":
        pool.update("dora", dora(2))
        wanted["dora"] = dora(2)
    for name, adapter in wanted.items():
        y = model(x, adapters=[name] * 3)
        torch.testing.assert_close(y, alone(now, adapter, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("call", "change"), [
    *itertools.product(["model", "layer"], [in_place, assigned, copied, one_row, cast_and_back, data_exchanged]),
    ("compiled", in_place), ("compiled", data_exchanged), ("plan", in_place),
])  # fmt: skip
def test_gains_follow_the_weights_under_an_open_batch(change, call):
    model, pool = served_net()
    called, x = model, torch.randn(3, 24)
    if call == "compiled":
        torch._dynamo.reset()
        called = torch.compile(model, backend="eager")
    names = {"dora": dora(0), "lora": random_adapter(1), None: None}

    def check(open_batch):
        y = x
        if call == "layer":
            for layer in model:
                y = layer(y)
        elif call == "plan":
            plan = open_batch.plan(3)
            y = multi_lora(x, model[0].weight, pool.sites["0"].slots, plan, model[0].bias).tanh()
            y = multi_lora(y, model[2].weight, pool.sites["2"].slots, plan)
        else:
            y = called(x)
        now = net()
        now.load_state_dict({name: t.float() for name, t in model.state_dict().items()})
        for i, adapter in enumerate(names.values()):
            torch.testing.assert_close(y[i], alone(now, adapter, x)[i], rtol=1e-4, atol=1e-5)

    with pool.batch(list(names)) as open_batch:
        check(open_batch)
        change(model)
        check(open_batch)
        in_place(model)
        check(open_batch)


def test_a_gain_anew_has_the_bits_of_a_load():
    model, pool = served_net()
    in_place(model)
    pool.batch(["dora"]).close()
    fresh = pool_of(unserve(copy.deepcopy(net())))
    in_place(fresh.model)
    fresh.load("dora", dora(0))
    slot, other = pool.id_of("dora"), fresh.id_of("dora")
    for name in SIZES:
        one, two = pool.sites[name].slots, fresh.sites[name].slots
        assert one.gain[one.flags[slot] >> 2].equal(two.gain[two.flags[other] >> 2])


def test_what_only_refresh_can_know():
    model, pool = served_net()
    x = torch.randn(1, 24)
    model[0].weight.data[7] *= 5
    model[2].weight.numpy()[2] = 1.0
    pool.refresh()
    now = net()
    now.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x, adapters=["dora"]), alone(now, dora(0), x), rtol=1e-4, atol=1e-5)


def test_a_model_of_inference_mode():
    """Its tensors count no versions."""
    with torch.inference_mode():
        model = net()
        pool = pool_of(model)
        pool.load("dora", dora(0))
        x = torch.randn(1, 24)
        serve(model, pool)
        torch.testing.assert_close(model(x, adapters=["dora"]), alone(net(), dora(0), x), rtol=1e-4, atol=1e-5)
        model.load_state_dict(other_weights(model), assign=True)
        now = net()
        now.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(x, adapters=["dora"]), alone(now, dora(0), x), rtol=1e-4, atol=1e-5)


def test_a_norm_of_weights_that_change_meanwhile(monkeypatch):
    """The gain is that of the weights after the load began, not of those before."""
    from lora_kernels.serving.site import Site

    model, gain, count = net(), Site.gain, []
    pool = pool_of(model)

    def changing(site, *args):
        found = gain(site, *args)
        if len(count) < 2:
            count.append(1)
            in_place(model)
        return found

    monkeypatch.setattr(Site, "gain", changing)
    pool.load("a", dora(0))
    served, x = serve(model, pool), torch.randn(1, 24)
    now = net()
    now.load_state_dict(model.state_dict())
    torch.testing.assert_close(served(x, adapters=["a"]), alone(now, dora(0), x), rtol=1e-4, atol=1e-5)

    def always(site, *args):
        in_place(model)
        return gain(site, *args)

    monkeypatch.setattr(Site, "gain", always)
    with pytest.raises(BaseChangedError, match="the base changed 8 times while the gains of 'b' were computed"):
        pool.load("b", dora(1))
    assert pool.names() == ["a"]


def resized(model):
    model[2] = nn.Linear(40, 18)


def replaced(model):
    model[2] = nn.Linear(40, 16, bias=False)


def cast(model):
    model.to(torch.bfloat16)


def removed(model):
    model[2] = nn.Identity()


@pytest.mark.parametrize(("change", "message"), [
    (resized, "another at 2: Linear has replaced the layer of `serve`"),
    (replaced, "another at 2: Linear has replaced the layer of `serve`"),
    (removed, "another at 2: Identity has replaced the layer of `serve`"),
    (cast, r"another at 0: the pages are for a weight \[40, 24\] torch.float32 on cpu, it is \[40, 24\] torch.bfloat16 on cpu"),
])  # fmt: skip
def test_pages_that_do_not_fit_any_more(change, message):
    """Neither a head that is left out nor a gain of before."""
    model, pool = served_net()
    pool.load("first", random_adapter(3, modules=["0"]))
    weights = copy.deepcopy(model.state_dict())
    change(model)
    before = pool.stats()

    def in_batch():
        with pool.batch(["dora", None]):
            model(torch.randn(2, 24, dtype=model[0].weight.dtype))

    for call in (
        in_batch, lambda: model(torch.randn(1, 24, dtype=model[0].weight.dtype), adapters=["dora"]),
        lambda: pool.load("new", random_adapter(4)), lambda: pool.update("lora", random_adapter(4)),
    ):  # fmt: skip
        with pytest.raises(BaseChangedError, match=message):
            call()
    after = pool.stats()
    assert set(pool.names()) == {"dora", "lora", "first"} and (after.residents, after.in_use) == (before.residents, 0)
    assert after.pages_free == before.pages_free
    if change is cast:
        model.to(torch.float32).load_state_dict(weights)
        x = torch.randn(1, 24)
        torch.testing.assert_close(model(x, adapters=["dora"]), alone(net(), dora(0), x), rtol=1e-4, atol=1e-5)
    else:
        pool.batch(["first"]).close()  # it changes another layer
        unserve(model)


@pytest.mark.parametrize(("change", "message"), [
    (resized, "another at 2: Linear has replaced"), (removed, "another at 2: Identity has replaced"),
    (cast, r"another at 0: the pages are for a weight .* it is \[40, 24\] torch.bfloat16"),
])  # fmt: skip
@pytest.mark.parametrize("compiled", [False, True])
def test_pages_that_do_not_fit_under_an_open_batch(change, message, compiled):
    model, pool = served_net()
    called = torch.compile(model, backend="eager") if compiled else model
    pool.load("first", random_adapter(3, modules=["0"]))
    with pool.batch(["dora", "lora"]):
        called(torch.randn(2, 24))
        change(model)
        for _ in range(2):
            with pytest.raises(BaseChangedError, match=message):
                called(torch.randn(2, 24, dtype=model[0].weight.dtype))
    if change is cast:
        model.to(torch.float32)
    if change is not resized:
        with pool.batch(["first"]):
            called(torch.randn(1, 24))  # no adapter of it changes the layer


def test_a_cast_under_adapters_without_gains():
    model, pool = served_net()
    with pool.batch(["lora"]):
        model(torch.randn(1, 24))
        cast(model)
        x = torch.randn(1, 24, dtype=torch.bfloat16)
        y, wanted = model(x), alone(copy.deepcopy(unserve(model)).float(), random_adapter(1), x.float())
        torch.testing.assert_close(y.float(), wanted, rtol=2e-2, atol=5e-2)


def test_layers_of_a_pool_that_is_not_served():
    """A layer of the same shape may take the place of another; serve and unserve change nothing."""
    model = net()
    pool = pool_of(model)
    pool.load("dora", dora(0))
    replaced(model)
    model.requires_grad_(False)
    pool.batch(["dora"]).close()
    for _ in range(2):
        x, now = torch.randn(1, 24), copy.deepcopy(model)
        torch.testing.assert_close(serve(model, pool)(x, adapters=["dora"]), alone(now, dora(0), x), rtol=1e-4, atol=1e-5)
        unserve(model)
        pool.batch(["dora"]).close()
    resized(model)
    with pytest.raises(BaseChangedError, match=r"at 2: the pages are for a weight \[16, 40\] .*, it is \[18, 40\]"):
        pool.batch(["dora"])


def test_a_vocabulary_that_grows():
    """Transformers puts another head and another embedding into the model."""
    from tests.serving.served import base

    model = base()
    pool = AdapterPool(model, capacity_bytes=8 << 20, slots=4)
    n_out, n_in = model.lm_head.weight.shape
    pool.load("head", Adapter({"lm_head": Factors(torch.ones(2, n_in), torch.ones(n_out, 2), 1.0)}))
    serve(model, pool)
    model.resize_token_embeddings(n_out + 8)
    with pytest.raises(BaseChangedError, match="another at lm_head: Linear has replaced the layer of `serve`"):
        model(torch.zeros(1, 3, dtype=torch.int64), adapters=["head"])
    plain = unserve(model)
    with pytest.raises(BaseChangedError, match="at lm_head: the pages are for a weight"):
        pool.batch(["head"])
    AdapterPool(plain, capacity_bytes=8 << 20, slots=4)
