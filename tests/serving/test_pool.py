"""The pool: what it holds, whom it evicts, and that nothing that fails changes anything."""


import pytest
import torch

import lora_kernels
from lora_kernels.adapters import AdapterError
from lora_kernels.serving import Adapter, AdapterPool, Factors, PoolFullError, adapter_of, read_adapter, serve
from tests.serving.pools import alone, net, pool_of, random_adapter, same_state, state
from tests.serving.served import KINDS, base, save_all, tokens, trained


def test_the_longest_unused_leaves():
    model = net()
    pool = pool_of(model, slots=3, pages=6)
    for i, name in enumerate("abc"):
        pool.load(name, random_adapter(i))
    with pool.batch(["a"]):
        pass
    pool.load("d", random_adapter(3))
    assert pool.names() == ["c", "a", "d"] and "b" not in pool and pool.stats().evictions == 1
    with pool.batch(["c", "a"]):
        pool.load("e", random_adapter(4))
        assert sorted(pool.names()) == ["a", "c", "e"]
        pool.load("f", random_adapter(5), pinned=True)
        before = state(pool)
        with pytest.raises(PoolFullError, match="no room for 'g': a slot wanted, and 3 adapters are in use or pinned"):
            pool.load("g", random_adapter(6))
        assert same_state(before, state(pool)) and sorted(pool.names()) == ["a", "c", "f"]
    pool.load("g", random_adapter(6))
    pool.load("h", random_adapter(7))
    assert pool.names() == ["f", "g", "h"]


def test_pages_not_only_slots():
    pool = pool_of(net(), slots=8, pages=4)
    pool.load("wide", random_adapter(0, r=20))
    assert pool.stats().pages_free == 1
    pool.load("thin", random_adapter(1, r=8))
    pool.load("some", random_adapter(2, r=3, modules=["0"]))
    assert pool.names() == ["thin", "some"]
    with pytest.raises(AdapterError, match="AdapterPool: 0: the rank may be 32, found 33"):
        pool.load("huge", random_adapter(3, r=33))
    with pytest.raises(PoolFullError, match="pages of 0, 2 wanted, and 1 adapters"), pool.batch(["thin"]):
        pool.load("full", random_adapter(3, r=32))


def test_nothing_is_left_behind():
    pool = pool_of(net())
    empty = state(pool)
    for kind in (False, True):
        pool.load("a", random_adapter(0, r=13, dora=kind))
        pool.evict("a")
        assert all(a.equal(b) for a, b in zip(empty[:8], state(pool)[:8], strict=True))
    with pytest.raises(LookupError, match="AdapterPool: no adapter is called 'a'; there are none"):
        pool.evict("a")


def test_an_id_of_one_that_left_is_stale():
    model = net()
    pool = pool_of(model)
    first = pool.load("a", random_adapter(0))
    pool.evict("a")
    assert pool.load("b", random_adapter(1)) != first
    site, x = pool.sites["0"], torch.randn(2, 24)
    from lora_kernels import multi_lora
    from lora_kernels.ops.multi_lora import BatchPlan

    plan = BatchPlan.build(torch.tensor([first, pool.id_of("b")]), 4)
    y = multi_lora(x, model[0].weight, site.slots, plan, model[0].bias)
    torch.testing.assert_close(y[0], model[0](x[0]))
    with pytest.raises(LookupError, match="out of range or stale"):
        plan.raise_errors()


def test_exchange_while_it_runs():
    model = net()
    pool = pool_of(model)
    served, x = serve(model, pool), torch.randn(1, 24)
    old, new = random_adapter(0), random_adapter(1, r=16)
    pool.load("a", old)
    with pool.batch(["a"]):
        pool.load("a", new, replace=True)
        torch.testing.assert_close(served(x), alone(net(), old, x))
        assert len(pool) == 1 and pool.stats().residents == 2
    assert pool.stats().residents == 1
    torch.testing.assert_close(served(x, adapters=["a"]), alone(net(), new, x))
    with pytest.raises(ValueError, match="AdapterPool: 'a' is loaded already; replace=True exchanges it"):
        pool.load("a", old)


def test_update_in_place():
    model = net()
    pool = pool_of(model)
    served, x = serve(model, pool), torch.randn(1, 24)
    number = pool.load("a", random_adapter(0, r=9, dora=True))
    places = [t.data_ptr() for site in pool.sites.values() for t in site.slots.tensors]
    for other in (
        random_adapter(1, r=9),
        random_adapter(2, r=16, dora=True),
        random_adapter(3, r=30),
        random_adapter(4, r=2, modules=["2"]),
        random_adapter(5, r=7),
    ):
        pool.update("a", other)
        torch.testing.assert_close(served(x, adapters=["a"]), alone(net(), other, x))
        assert pool.id_of("a") == number
    assert places == [t.data_ptr() for site in pool.sites.values() for t in site.slots.tensors]
    pool.load("b", random_adapter(6, r=16))
    before = state(pool)
    with pytest.raises(PoolFullError, match="AdapterPool: 0 has 1 pages too few for 'a'"):
        pool.update("a", random_adapter(7, r=24))
    assert same_state(before, state(pool))
    with pytest.raises(LookupError, match="no adapter is called 'c'; there are a, b"):
        pool.update("c", random_adapter(0))


def test_the_host_keeps_what_was_evicted():
    model = net()
    one = random_adapter(0).nbytes
    pool = pool_of(model, slots=2, pages=2, host_bytes=3 * one)
    served, x = serve(model, pool), torch.randn(1, 24)
    adapters = {name: random_adapter(i) for i, name in enumerate("abcd")}
    for name, adapter in adapters.items():
        pool.load(name, adapter)
    assert pool.names() == ["c", "d"] and "a" not in pool and "b" in pool
    for name in "bcdbc":
        torch.testing.assert_close(served(x, adapters=[name]), alone(net(), adapters[name], x))
    stats = pool.stats()
    assert stats.on_host == 3 and stats.bytes_on_host == 3 * one and stats.misses >= 3
    pool.prefetch(["d"])
    assert pool.names()[-1] == "d"
    pool.evict("b")
    assert "b" not in pool


@pytest.mark.parametrize(("source", "message"), [
    (Adapter({"1": Factors(torch.ones(1, 24), torch.ones(40, 1), 1.0)}), "changes modules that the pool does not have: 1"),
    (Adapter({"0": Factors(torch.ones(1, 23), torch.ones(40, 1), 1.0)}), r"0: a and b must be \[r, 24\] and \[40, r\]"),
    (Adapter({"0": Factors(torch.ones(70, 24), torch.ones(40, 70), 1.0)}), "0: the rank may be 32, found 70"),
    (Adapter({"0": Factors(torch.full((1, 24), torch.nan), torch.ones(40, 1), 1.0)}), "a has values that are not finite"),
    (Adapter({"0": Factors(torch.ones(1, 24), torch.full((40, 1), torch.inf), 1.0)}), "b has values that are not finite"),
    (Adapter({"0": Factors(torch.ones(1, 24).double() * 1e300, torch.ones(40, 1), 1.0)}), "not finite as torch.float32"),
    (Adapter({"0": Factors(torch.ones(1, 24), torch.ones(40, 1), 1.0, torch.full((40,), torch.nan))}), "magnitude has values"),
    ("/nowhere", "/nowhere: is not a directory"),
])  # fmt: skip
def test_a_bad_adapter_changes_nothing(source, message):
    pool = pool_of(net(), slots=1)
    pool.load("a", random_adapter(0))
    before = state(pool)
    with pytest.raises(AdapterError, match=message):
        pool.load("b", source)
    with pytest.raises(AdapterError, match=message):
        pool.update("a", source)
    assert same_state(before, state(pool)) and pool.names() == ["a"] and pool.stats().failures == 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("adapters"), ["lora", "dora", "lora_bias"])[0]


def test_damaged_files(saved, tmp_path):
    model = base()
    pool = AdapterPool(model, capacity_bytes=8 << 20)
    weights = (saved["lora"] / "adapter_model.safetensors").read_bytes()
    config = (saved["lora"] / "adapter_config.json").read_text()
    cases = {
        "truncated": (weights[:-100], config, "is truncated or damaged"),
        "empty": (b"", config, "is truncated or not safetensors"),
        "other": (weights, config.replace('"r": 8', '"r": 4'), "must have shape"),
        "no json": (weights, config[:50], "adapter_config.json"),
        "bias": (weights, config.replace('"bias": "none"', '"bias": "all"'), "trains biases of the base"),
        "saved": (weights, config.replace('"modules_to_save": null', '"modules_to_save": ["lm_head"]'), "has modules_to_save"),
        "norm": (weights, config.replace('"q_proj"', '"input_layernorm"'), "layernorm, which are neither nn.Linear nor"),
        "pissa": (weights, config.replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'), "weights='pissa'"),
        "unknown": (weights, config.replace('"use_qalora": false', '"use_qalora": true'), "use_qalora=True asks"),
    }  # fmt: skip
    for name, (data, text, message) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(data)
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterError, match=message):
            pool.load(name, folder)
    assert not len(pool) and pool.stats().failures == len(cases)


def test_tensors_of_a_trainer(saved):
    import peft

    model, x = base(), tokens(2)
    pool = AdapterPool(model, capacity_bytes=8 << 20)
    pool.load("dora", saved["dora"])
    served = serve(model, pool)
    for kind in ("dora", "lora_bias"):
        peft_model = trained(kind, seed=5)
        source = peft_model.peft_config["default"], peft.get_peft_model_state_dict(peft_model)
        pool.update("dora", source)
        wanted = peft_model(x).logits
        torch.testing.assert_close(served(x, adapters=["dora"] * 2).logits, wanted, rtol=1e-4, atol=1e-5)
    config, tensors = source
    for change, message in (
        (dict(list(tensors.items())[1:]), "1 tensors are missing"),
        (tensors | {"else": torch.ones(1)}, "1 tensors are not of this adapter: else"),
        (tensors | {next(iter(tensors)): torch.ones(2, 2)}, "must be floating"),
        (tensors | {next(iter(tensors)): next(iter(tensors.values())) * torch.nan}, "not finite"),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=message):
            adapter_of(model, config, change)


def test_load_adapter_and_the_pool_read_the_same(saved):
    model = base()
    adapter = read_adapter(model, saved["dora"])
    other = base()
    lora_kernels.load_adapter(other, saved["dora"])
    layers = dict(other.named_modules())
    assert adapter.factors.keys() == {n for n, m in layers.items() if hasattr(m, "lora_A")}
    for name, f in adapter.factors.items():
        assert f.a.equal(layers[name].lora_A) and f.b.equal(layers[name].lora_B) and f.scale == layers[name].scaling


def test_kinds_are_all_tested():
    assert {"use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias"} <= {k for v in KINDS.values() for k in v}
