"""What a pool makes of what it is given: factors, names, the name of a base, and names that it does
not know."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from lora_kernels.adapters import AdapterError
from lora_kernels.serving import Adapter, AdapterPool, Factors, serve
from tests.serving.pools import alone, net, pool_of, random_adapter, same_state, state

F = lambda **changes: Adapter({"0": Factors(**{"a": torch.ones(2, 24), "b": torch.ones(40, 2), "scale": 1.0, **changes})})  # noqa: E731


@pytest.mark.parametrize(("source", "message"), [
    (F(bias=torch.ones(3)), r"bias must be \[40\], found \[3\]"), (F(magnitude=torch.ones(1, 40)), r"magnitude must be \[40\]"),
    (F(magnitude=torch.ones(39)), r"magnitude must be \[40\], found \[39\]"), (F(scale=float("inf")), "scale must be a finite"),
    (F(scale=float("nan")), "scale must be a finite number, found nan"), (F(scale=1e39), "the scale must be a finite number"),
    (F(scale=True), "the scale must be a finite number"), (F(scale=torch.tensor(1.0)), "the scale must be a finite number"),
    (F(scale=1e30, bias=torch.full((40,), 1e30)), "scale times bias has values that are not finite"),
    (F(a=torch.ones(2)), "a and b must be"), (F(a=torch.ones(0, 24), b=torch.ones(40, 0)), "a and b must be"),
    (F(a=torch.ones(2, 24, dtype=torch.int32)), "a must be floating, found torch.int32"), (F(b=None), "b must be a tensor"),
    (F(bias=[1.0]), "bias must be a tensor, found list"),
])  # fmt: skip
def test_factors_are_checked_at_the_door(source, message):
    pool = pool_of(net(), slots=2)
    pool.load("a", random_adapter(0))
    before = state(pool)
    for call in (pool.load, pool.update):
        with pytest.raises(AdapterError, match=message):
            call("a" if call == pool.update else "b", source)
    assert same_state(before, state(pool))


@pytest.mark.parametrize("name", [None, 3, b"a", ("a",)])
def test_names_are_strings(name):
    pool = pool_of(net())
    with pytest.raises(TypeError, match="AdapterPool: a name must be a string, found"):
        pool.load(name, random_adapter(0))
    with pytest.raises(LookupError, match="no adapter is called 'zz'; there are none"):
        pool.evict("zz")


def test_a_trainers_tensors_are_copied():
    """It writes to its own, and lets them go wrong; what was loaded comes back from the host."""
    model = net()
    pool = pool_of(model, slots=1, host_bytes=1 << 20)
    served, x = serve(model, pool), torch.randn(1, 24)
    live = random_adapter(0, dora=True)
    wanted = alone(net(), live, x)
    pool.load("policy", live)
    pool.load("other", random_adapter(1))
    for f in live.factors.values():
        for t in (f.a, f.b, f.magnitude):
            t.fill_(torch.nan)
    torch.testing.assert_close(served(x, adapters=["policy"]), wanted)


def test_a_name_on_the_host_is_a_name():
    model = net()
    pool = pool_of(model, slots=1, host_bytes=1 << 20)
    served, x = serve(model, pool), torch.randn(1, 24)
    pool.load("a", random_adapter(0)), pool.load("b", random_adapter(1))
    assert "a" in pool and pool.names() == ["b"]
    before = pool.version_of("a")
    assert pool.update("a", random_adapter(2)) == pool.version_of("a") > before and pool.names() == ["b"]
    with pytest.raises(ValueError, match="'a' is loaded already; replace=True"):
        pool.load("a", random_adapter(3))
    torch.testing.assert_close(served(x, adapters=["a"]), alone(net(), random_adapter(2), x))
    assert pool.id_of("b") != pool.id_of("a")
    pool.load("b", random_adapter(4), replace=True)
    torch.testing.assert_close(served(x, adapters=["b"]), alone(net(), random_adapter(4), x))
    pool.evict("a")
    with pytest.raises(LookupError, match="no adapter is called 'a'; there are b"):
        pool.version_of("a")


@pytest.mark.parametrize(("trained_on", "own", "same"), [
    ("meta/Llama-8B", "meta/Llama-8B", True), ("meta/Llama-8B", "meta/Llama-8B-Instruct", False), ("", "meta/Llama", True),
    (None, "meta/Llama", True), ("meta/Llama", "", True), ("meta/Llama", None, True), ("meta/Llama", "other/Llama", False),
    ("meta/Llama", "/models/Llama/", True), ("meta/Llama", "./Mistral", False), ("/a/Llama", "/b/llama", True),
    ("meta/Llama", "/cache/models--meta--Llama/snapshots/0a1b2c", True), ("a/b", "/c/models--a--d/snapshots/1", False),
])  # fmt: skip
def test_an_adapter_of_another_base(trained_on, own, same):
    model = net()
    if own is not None:
        model.name_or_path = own
    pool = pool_of(model)
    adapter = replace(random_adapter(0), base=trained_on)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pool.load("a", adapter)
        pool.update("a", adapter)
    text = f"AdapterPool: 'a' was trained on {trained_on!r}, the model is {own!r}; if those are other weights, what it"
    assert [str(each.message).startswith(text) and each.filename == __file__ for each in caught] == [True] * 2 * (not same)
    if same:
        pool.load("b", adapter, strict=True)
        return
    with pytest.raises(AdapterError, match=f"'b' was trained on '{trained_on}', the model is '{own}'; strict=True refuses it"):
        pool.load("b", adapter, strict=True)
    with pytest.raises(AdapterError, match="strict=True refuses it"):
        pool.update("a", adapter, strict=True)
    assert pool.names() == ["a"]


def test_files_name_their_base(tmp_path):
    import peft

    from tests.serving.served import base

    tuned = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path)
    state = peft.get_peft_model_state_dict(tuned)
    tuned.peft_config["default"].base_model_name_or_path = "owner/other"
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "owner/other"}))
    model = base()
    model.name_or_path = "owner/this"
    pool = AdapterPool(model, capacity_bytes=8 << 20)
    for source in (tmp_path, (tuned.peft_config["default"], state)):
        with pytest.warns(UserWarning, match="'a' was trained on 'owner/other', the model is 'owner/this'"):
            pool.load("a", source, replace=True)


def test_an_unknown_name_fails_alone():
    model = net()
    pool = pool_of(model)
    pool.load("a", random_adapter(0)), pool.load("b", random_adapter(1))
    x = torch.randn(3, 24)
    adapters = {"a": random_adapter(0), "b": random_adapter(1), None: None}
    wanted = {name: alone(net(), adapter, x) for name, adapter in adapters.items()}
    serve(model, pool)

    def rows(adapters, missing, weights=None):
        with pool.batch(adapters, weights, missing=missing) as batch:
            return model(x), batch.missing

    y, absent = rows(["a", "zz", "b"], "base")
    assert absent == {"zz"}
    torch.testing.assert_close(y, torch.stack([wanted["a"][0], wanted[None][1], wanted["b"][2]]))
    y, absent = rows(["zz", "b", ["zz", "b"]], {"zz": "a"}.get)
    assert not absent
    both = model[2](torch.tanh(model[0](x)))
    torch.testing.assert_close(y[:2], torch.stack([wanted["a"][0], wanted["b"][1]]))
    assert not torch.allclose(y[2], both[2])
    y, absent = rows([["yy", "b"], None, "zz"], lambda name: None, [[2.0, 1.0], [], 3.0])
    assert absent == {"yy", "zz"}
    torch.testing.assert_close(y, torch.stack([wanted["b"][0], wanted[None][1], wanted[None][2]]))

    def load(name):
        pool.load(name, random_adapter(1))
        return name

    y, absent = rows(["late", None, "a"], load)
    torch.testing.assert_close(y, torch.stack([wanted["b"][0], wanted[None][1], wanted["a"][2]]))
    for missing in ("raise", lambda name: name, lambda name: "nobody"):
        with pytest.raises(LookupError, match="no adapter is called '(zz|nobody)'; there are a, b, late"):
            rows(["zz", None, None], missing)
    for wrong in ("skip", None, 3):
        with pytest.raises(ValueError, match="missing must be 'raise', 'base' or a function, found"):
            rows(["a", None, None], wrong)
    with pytest.raises(TypeError, match="missing gave 3 for 'zz'; it must give a name or None"):
        rows(["zz", None, None], lambda name: 3)
    assert pool.stats().in_use == 0
