"""Experts in a batch: each sequence gets what PEFT computes of it alone."""

import copy

import pytest
import torch

from lora_kernels import use_backend
from lora_kernels.adapters import AdapterError
from lora_kernels.ops.multi_lora.plan import BASE, id_of, ids_of_experts
from lora_kernels.serving import Adapter, AdapterPool, Factors, PoolFullError, serve, unserve
from tests.serving.experts import (
    BOTH,
    MODELS,
    assert_rows,
    base,
    modules_of,
    pool_of,
    random_adapter,
    served,
    trained,
    unserved,
    with_adapter,
)  # fmt: skip
from tests.serving.faults import Fault, everything, same, with_fault_at
from tests.serving.served import tokens

NAMES = ["experts", None, "down", "dora", "all", "experts"]
EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_each_row_is_as_peft_computes_it(kind, backend, tmp_path):
    model, _, exact = served(base(kind), tmp_path)
    x, plain = tokens(len(NAMES)), base(kind)
    with use_backend(backend):
        assert_rows(model(x, adapters=NAMES).logits, NAMES, exact, x)
        alone = model(x, adapters=["all"] * len(NAMES)).logits
        assert_rows(alone, ["all"] * len(NAMES), exact, x)
    assert model(x).logits.equal(plain(x).logits)
    assert unserve(model)(x).logits.equal(plain(x).logits) and not vars(model.get_submodule(EXPERTS)).keys() & {"forward"}


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_other_implementations_of_the_base(implementation, tmp_path):
    model, _, exact = served(base("qwen3", implementation=implementation), tmp_path, ["experts", "down"])
    for each in exact.values():
        (each if hasattr(each, "set_experts_implementation") else each.base_model.model).set_experts_implementation("eager")
    names, x = ["experts", None, "down"], tokens(3)
    assert_rows(model(x, adapters=names).logits, names, exact, x)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_greedy_tokens_are_those_of_peft(kind, tmp_path):
    model, _, exact = served(base(kind), tmp_path)
    x, options = tokens(len(NAMES), 4), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(x, adapters=NAMES, **options)
    for i, name in enumerate(NAMES):
        assert found[i].equal(exact[name].generate(input_ids=x[i : i + 1], **options)[0])


def test_16_bits(tmp_path):
    model, _, exact = served(base("qwen3", torch.bfloat16), tmp_path)
    x = tokens(len(NAMES))
    assert_rows(model(x, adapters=NAMES).logits, NAMES, exact, x, 0.05)


def test_several_adapters_for_one_sequence(tmp_path):
    """What several add is what one of all their ranks adds."""
    model = base("mixtral")
    pool = pool_of(model)
    one, two = random_adapter(pool, 1, r=4), random_adapter(pool, 2, r=7, modules=BOTH[1:])
    sums = {}
    for name, f in one.factors.items():
        g = two.factors.get(name)
        parts = [(f, 0.5)] + ([] if g is None else [(g, -2.0)])
        a, b = torch.cat([p.a for p, _ in parts], 1), torch.cat([v * p.scale * p.b for p, v in parts], 2)
        sums[name] = Factors(a, b, 1.0)
    for name, each in {"one": one, "two": two, "sum": Adapter(sums)}.items():
        pool.load(name, each)
    exact = {"sum": with_adapter(model, Adapter(sums)), "one": with_adapter(model, one), None: copy.deepcopy(model).double()}
    x = tokens(3)
    y = serve(model, pool)(x, adapters=[["one", "two"], [], "one"], adapter_weights=[[0.5, -2.0], [], [1.0]]).logits
    assert_rows(y, ["sum", None, "one"], exact, x)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_dora_of_experts(kind, backend):
    """PEFT has none: beside the weights that the paper's formula gives, in float64; and again after
    the base has changed."""
    model = base(kind)
    pool = pool_of(model)
    dora, lora = random_adapter(pool, 1, r=3, dora=True), random_adapter(pool, 2, r=11)
    pool.load("dora", dora), pool.load("lora", lora)
    serve(model, pool)
    x, names = tokens(4), ["dora", None, "lora", "dora"]
    with use_backend(backend):
        for _ in range(2):
            exact = {"dora": with_adapter(model, dora), "lora": with_adapter(model, lora), None: unserved(model).double()}
            assert_rows(model(x, adapters=names).logits, names, exact, x)
            with torch.no_grad():
                model.get_parameter(f"{EXPERTS}.down_proj").mul_(1.5).add_(0.1)
                model.get_parameter(f"{EXPERTS}.gate_up_proj")[1] *= -2


def test_rows_do_not_depend_on_others(tmp_path):
    model, _, _ = served(base("qwen3"), tmp_path)
    x = tokens(1, 5).expand(4, 5)
    first = model(x, adapters=["experts", "down", None, "all"]).logits
    other = model(x, adapters=["experts", "all", "down", None]).logits
    assert first[0].equal(other[0]) and first[1].equal(other[2]) and first[2].equal(other[3]) and first[3].equal(other[1])
    assert model(x, adapters=["experts", "down", None, "all"]).logits.equal(first)


def test_one_token_and_experts_without_tokens(tmp_path):
    model, pool, exact = served(base("qwen3"), tmp_path, ["experts", "down"])
    x = tokens(1, 1)
    for name in ("experts", "down"):
        assert_rows(model(x, adapters=[name]).logits, [name], exact, x)
    with pool.batch(["experts"]):
        y = model.get_submodule(EXPERTS)(torch.zeros(0, 32), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3))
    assert y.shape == (0, 32)


def test_sentinels_are_no_experts(tmp_path):
    """As expert parallelism marks the choices that are of other processes."""
    model, pool, exact = served(base("mixtral"), tmp_path, ["experts"])
    layer, plain = model.get_submodule(EXPERTS), exact["experts"].base_model.model.get_submodule(EXPERTS)
    x, weights = torch.randn(2, 32), torch.rand(2, 2)
    index = torch.tensor([[5, 1], [4, 5]])
    with pool.batch(["experts", None]), torch.no_grad():
        y = layer(x, index, weights * (index < 5))
    with torch.no_grad():
        wanted = plain(x.double(), index, (weights * (index < 5)).double())
        frozen = exact[None].get_submodule(EXPERTS)(x.double(), index, (weights * (index < 5)).double())
    torch.testing.assert_close(y[0].double(), wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[1].double(), frozen[1], rtol=1e-4, atol=1e-5)


def test_eviction_and_return():
    """Room for one: the other leaves, its pages are zeros, and it is the same when it is back."""
    model = base("mixtral")
    size = AdapterPool.sizing(model, [8], modules=modules_of(model), slots=2, max_rank=16)
    pool = pool_of(model, capacity_bytes=size.capacity_bytes, slots=2, host_bytes=1 << 20)
    assert size.holds(8) == 1 and pool.size == size
    pool.load("a", random_adapter(pool, 1, r=8)), pool.load("b", random_adapter(pool, 2, r=3))
    assert pool.names() == ["b"] and pool.stats().evictions == 1
    serve(model, pool)
    x = tokens(2)
    b = model(x, adapters=["b", None]).logits
    a = model(x, adapters=["a", None]).logits
    exact = {"a": with_adapter(unserved(model), random_adapter(pool, 1, r=8)), None: unserved(model).double()}
    assert_rows(a, ["a", None], exact, x)
    assert model(x, adapters=["b", None]).logits.equal(b) and model(x, adapters=["a", None]).logits.equal(a)
    with pytest.raises(PoolFullError, match="no room for 'b'"), pool.batch(["a"]):
        pool.batch(["b"])
    pool.evict("a"), pool.evict("b")
    assert all(not t.any() for site in pool.sites.values() for t in site.slots.tensors[:6])


def test_stale_ids_are_told():
    model = base("mixtral")
    pool = pool_of(model)
    pool.load("a", random_adapter(pool, 1))
    serve(model, pool)
    x, wanted = tokens(2), model(tokens(2), adapters=["a", None]).logits
    batch = pool.batch(["a", None])
    batch.ids[0] += 1 << 32
    with pytest.raises(LookupError, match="out of range or stale"), batch:
        y = model(x).logits
    torch.testing.assert_close(y, model(x).logits)
    assert not torch.allclose(y[0], wanted[0], rtol=1e-2)


def test_ids_of_experts():
    ids = torch.tensor([id_of(3, 2), BASE, -7, id_of(0, (1 << 32) - 1)])
    expert = torch.tensor([4, 0, 1, 4])
    assert ids_of_experts(ids, expert, 5).tolist() == [id_of(3, 14), BASE, -7, BASE - 1]
    assert ids_of_experts(ids, torch.full((4,), 5), 5).tolist() == [BASE] * 4


def test_update_in_place_and_beside_a_batch(tmp_path):
    model = base("qwen3")
    pool = pool_of(model)
    first, second, third = random_adapter(pool, 1), random_adapter(pool, 2, r=12, dora=True), random_adapter(pool, 3, r=1)
    pool.load("a", first)
    serve(model, pool)
    x = tokens(2)
    with pool.batch(["a", None]):
        before = model(x).logits
        pool.update("a", second)
        assert model(x).logits.equal(before)
    for each in (second, third):
        pool.update("a", each)
        exact = {"a": with_adapter(unserved(model), each), None: unserved(model).double()}
        assert_rows(model(x, adapters=["a", None]).logits, ["a", None], exact, x)


def crowded(model):
    """Two slots and their pages, all taken."""
    size = AdapterPool.sizing(model, [8, 8], dora=True, modules=[EXPERTS], slots=2, max_rank=16)
    pool = AdapterPool(model, capacity_bytes=size.capacity_bytes, slots=2, max_rank=16, modules=[EXPERTS])
    pool.load("a", random_adapter(pool, 1, r=8, dora=True)), pool.load("b", random_adapter(pool, 2, r=8, dora=True))
    return pool


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 41])
def test_faults_leave_the_pool_as_it_was(stride):
    model = base("mixtral")
    pool, step = crowded(model), 1
    before, new = everything(pool), random_adapter(pool, 3, r=5, dora=True)
    pool.load("c", new)
    done, pool = everything(pool), crowded(model)
    while with_fault_at(step, lambda: pool.load("c", new), Fault):  # noqa: B023
        after = everything(pool)
        if not same(after, before):
            assert same(after, done), f"step {step}"
            pool = crowded(model)
        step += stride
    assert same(everything(pool), done) and step > 10 * stride


def test_pages_of_experts():
    """How many bytes are taken, and that no page is another's."""
    model = base("qwen3", torch.bfloat16)
    size = AdapterPool.sizing(model, [9, 4], dora=True, modules=[EXPERTS], max_rank=16)
    pool = AdapterPool(model, capacity_bytes=size.capacity_bytes, slots=2, max_rank=16, modules=[EXPERTS])
    stored = [t.untyped_storage() for site in pool.sites.values() for t in site.slots.tensors[:8]]
    assert sum({each.data_ptr(): each.nbytes() for each in stored}.values()) == pool.capacity_bytes
    pool.load("a", random_adapter(pool, 1, r=9, dora=True)), pool.load("b", random_adapter(pool, 2, r=4, dora=True))
    assert pool.stats().pages_free == 0 and pool.bytes_in_use == pool.capacity_bytes
    for site in pool.sites.values():
        s, count = site.slots, site.experts
        used = [int(page) for slot in range(2 * count) for page in s.table[slot, : -(-int(s.rank[slot]) // 8)]]
        assert len(set(used)) == len(used) == 3 * count
        rows = (s.flags >> 2).tolist()
        assert len(set(rows)) == 2 * count and bool((s.flags & 3 == 1).all())
        assert not {row // 4 for row in rows} & set(used)


def test_what_is_refused(tmp_path):
    model = base("mixtral")
    with pytest.raises(TypeError, match="'model.layers.0.mlp.gate' must be a plain nn.Linear or .* found MixtralTopKRouter"):
        AdapterPool(model, capacity_bytes=1 << 20, modules=["model.layers.0.mlp.gate"])
    with pytest.raises(TypeError, match="served on act of MixtralExperts: its experts' matrices are gate_up_proj and down"):
        AdapterPool(model, capacity_bytes=1 << 20, modules=[f"{EXPERTS}.act"])
    model.set_experts_implementation("batched_mm")
    layers = AdapterPool(model, capacity_bytes=8 << 20)
    assert not any("experts" in name for name in layers.sites)
    trained(model, "experts").save_pretrained(tmp_path / "experts")
    with pytest.raises(AdapterError, match=f"changes modules that the pool does not have: {EXPERTS}.down_proj"):
        layers.load("a", tmp_path / "experts")
    only = AdapterPool(model, capacity_bytes=8 << 20, modules=[f"{EXPERTS}.down_proj"])
    f = random_adapter(only).factors[f"{EXPERTS}.down_proj"]
    for wrong in (Factors(f.a[0], f.b[0], 1.0), Factors(f.a[1:], f.b[1:], 1.0), Factors(f.a, f.b, 1.0, torch.ones(32))):
        with pytest.raises(AdapterError, match="must be .5, "):
            only.load("a", Adapter({f"{EXPERTS}.down_proj": wrong}))
    with pytest.raises(AdapterError, match="experts have no lora_bias in a batch"):
        only.load("a", Adapter({f"{EXPERTS}.down_proj": Factors(f.a, f.b, 1.0, None, torch.zeros(5, 32))}))
    oss = pool_of(base("gpt_oss"))
    with pytest.raises(AdapterError, match="experts with a bias have no DoRA in a batch"):
        oss.load("a", random_adapter(oss, dora=True))


def test_bad_calls_are_refused(tmp_path):
    model, pool, _ = served(base("mixtral"), tmp_path, ["experts"])
    layer, index = model.get_submodule(EXPERTS), torch.tensor([[0, 3], [4, 1]])
    x, weights = torch.randn(2, 32), torch.rand(2, 2)
    for args, error, says in (
        ((x.double(), index), TypeError, "x must have the dtype of gate_up_proj, torch.float32, found torch.float64"),
        ((x.bfloat16(), index), TypeError, "x must have the dtype of gate_up_proj, torch.float32, found torch.bfloat16"),
        ((x, index + 2), ValueError, "index must hold numbers of experts up to 5, found 6"),
        ((x, index - 1), ValueError, "index must hold numbers of experts, found a negative one"),
    ):
        with pytest.raises(error, match=says), pool.batch(["experts", None]):
            layer(*args, weights)


def test_a_copy_serves_nobody(tmp_path):
    model, pool, _ = served(base("mixtral"), tmp_path, ["experts"])
    other, x = copy.deepcopy(model), tokens(2)
    with pool.batch(["experts", None]):
        assert other(x).logits.equal(base("mixtral")(x).logits)
    with pytest.raises(RuntimeError, match="adapters: this is a copy of a served model"):
        other(x, adapters=["experts", None])


def test_rows_that_the_caller_says(tmp_path):
    model, pool, exact = served(base("mixtral"), tmp_path, ["experts"])
    layer, of = model.get_submodule(EXPERTS), {name: m for name, m in exact.items()}
    x, index, weights = torch.randn(5, 32), torch.randint(5, (5, 2)), torch.rand(5, 2)
    refused = pytest.raises(ValueError, match=f"adapters: 2 were given, for {EXPERTS} with an input of")
    with refused, pool.batch(["experts", None]):
        layer(x, index, weights)
    with pool.batch(["experts", None], rows=[0, 1, 0, -1, 1]):
        y = layer(x, index, weights)
    wanted = of["experts"].base_model.model.get_submodule(EXPERTS)(x.double(), index, weights.double())
    plain = of[None].get_submodule(EXPERTS)(x.double(), index, weights.double())
    mine = torch.tensor([True, False, True, False, False])
    torch.testing.assert_close(y.double(), torch.where(mine[:, None], wanted, plain), rtol=1e-4, atol=1e-5)


def test_triton(tmp_path):
    """A layer in the interpreter: a pair of adapter and expert is a slot there, too."""
    interpreted = pytest.importorskip("tests.ops.interpreted").interpreted
    model, pool, _ = served(base("mixtral"), tmp_path, ["experts", "down"])
    layer = model.get_submodule(EXPERTS)
    draw = torch.Generator().manual_seed(4)
    x, weights = torch.randn(3, 32, generator=draw), torch.rand(3, 2, generator=draw)
    index = torch.tensor([[0, 3], [3, 1], [4, 3]])
    with pool.batch(["experts", None, "down"]), torch.no_grad():
        wanted = layer(x, index, weights)
        with interpreted() as names:
            y = layer(x, index, weights)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)
    assert names == ["expert_product_kernel", "multi_shrink_kernel", "multi_lora_kernel"] * 2


def test_a_compiled_model(tmp_path):
    """The experts of a batch run outside the graphs."""
    model, pool, _ = served(base("mixtral", layers=1), tmp_path, ["experts"])
    x, compiled = tokens(2), torch.compile(model, backend="eager")
    wanted = model(x, adapters=["experts", None]).logits
    with pool.batch(["experts", None]):
        torch.testing.assert_close(compiled(x).logits, wanted)
