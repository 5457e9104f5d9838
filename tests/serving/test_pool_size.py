"""What a pool takes and holds: the sizing helper and the pool agree, and say so."""

import pytest
import torch
from torch import nn

from lora_kernels import multi_lora, multi_lora_add_, use_backend
from lora_kernels.adapters import AdapterError
from lora_kernels.ops import BatchPlan, missing_backends
from lora_kernels.ops.multi_lora.plan import rows_of
from lora_kernels.ops.registry import ON_GPU
from lora_kernels.serving import Adapter, AdapterPool, Factors, PoolFullError, serve
from lora_kernels.serving.site import Pages, Prepared

N_IN, N_OUT = 40, 24
MIB = 1 << 20


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N_IN, N_OUT), nn.Linear(N_OUT, N_IN)).to(dtype).requires_grad_(False)


def random_adapter(seed, r, dora=False, bias=False):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g) * 0.3  # noqa: E731
    shapes = {"0": (N_IN, N_OUT), "1": (N_OUT, N_IN)}
    return Adapter({
        name: Factors(draw(r, n_in), draw(n_out, r), 0.7, draw(n_out).abs() + 0.5 if dora else None,
                      draw(n_out) if bias else None)
        for name, (n_in, n_out) in shapes.items()
    })  # fmt: skip


def llama_8b():
    """The linear layers of Llama 3.1 8B, without memory."""
    with torch.device("meta"):
        sizes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096),
                 "gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}  # fmt: skip
        linear = lambda n_in, n_out: nn.Linear(n_in, n_out, bias=False, dtype=torch.bfloat16)  # noqa: E731
        layers = [nn.ModuleDict({name: linear(*size) for name, size in sizes.items()}) for _ in range(32)]
        return nn.ModuleList([*layers, linear(4096, 128256)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dora", "bias"), [(False, False), (True, False), (False, True), (True, True)])
def test_it_holds_what_the_helper_says(dtype, dora, bias):
    model, ranks = net(dtype), [16, 3, 8, 20, 1, 9, 8]
    size = AdapterPool.sizing(model, ranks, dora=dora, lora_bias=bias, max_rank=32)
    with pytest.raises(PoolFullError) if size.pages > 1 else pytest.raises(ValueError):
        less = AdapterPool(model, capacity_bytes=size.capacity_bytes - 1, slots=len(ranks), max_rank=32)
        for i, r in enumerate(ranks):
            less.load(str(i), random_adapter(i, r, dora, bias), pinned=True)
    pool = AdapterPool(model, capacity_bytes=size.capacity_bytes, slots=size.slots, max_rank=32)
    assert pool.size == size
    stored = [t.untyped_storage() for site in pool.sites.values() for t in site.slots.tensors[:8]]
    assert sum({each.data_ptr(): each.nbytes() for each in stored}.values()) == pool.capacity_bytes
    for i, r in enumerate(ranks):
        pool.load(str(i), random_adapter(i, r, dora, bias), pinned=True)
    assert pool.stats().pages_free == 0 and pool.bytes_in_use == pool.capacity_bytes
    served, x = serve(model, pool), torch.randn(len(ranks), N_IN).to(dtype)
    for i, y in enumerate(served(x, adapters=[str(i) for i in range(len(ranks))])):
        expected = x[i].double()
        for name, layer in enumerate(net(dtype)):
            f, w = random_adapter(i, ranks[i], dora, bias).factors[str(name)], layer.weight.double()
            a, b, m, c = (None if t is None else t.to(dtype).double() for t in (f.a, f.b, f.magnitude, f.bias))
            whole = w + f.scale * b @ a
            if m is not None:
                whole = (f.magnitude.double() / whole.norm(dim=1))[:, None] * whole
            expected = whole @ expected + layer.bias.double() + (0 if f.bias is None else f.scale * c)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 6e-2)


@pytest.mark.parametrize("flags", [{}, {"dora": True}, {"lora_bias": True}], ids=str)
def test_a_pool_holds_as_many_as_its_size_says(flags):
    pool = AdapterPool(net(torch.bfloat16), capacity_bytes=60_000, slots=20, max_rank=16)
    most = pool.size.holds(9, **flags)
    assert 0 < most < 20
    of = {"dora": "dora" in flags, "bias": "lora_bias" in flags}
    for i in range(most):
        pool.load(str(i), random_adapter(i, 9, **of), pinned=True)
    with pytest.raises(PoolFullError, match="pages of 0, 1 wanted"):
        pool.load("more", random_adapter(0, 9, **of))
    assert AdapterPool(net(), capacity_bytes=60_000, slots=2).size.holds(1) == 2


def test_gains_share_a_page_and_leave_it():
    """Four adapters' gains in one page of 16 bits; it is free once the last has left, and full
    again for another's ranks."""
    pool = AdapterPool(net(torch.bfloat16), capacity_bytes=40_000, slots=8, max_rank=64)
    pages = pool.stats().pages_free
    for i in range(4):
        pool.load(str(i), random_adapter(i, 8, dora=True))
        assert pool.stats().pages_free == pages - i - 2
    pool.load("fifth", random_adapter(4, 8, dora=True))
    assert pool.stats().pages_free == pages - 7 and all(len(site.shared) == 2 for site in pool.sites.values())
    for i in range(4):
        pool.evict(str(i))
        assert pool.stats().pages_free == pages - 6 + i + (i == 3)
    pool.evict("fifth")
    assert pool.stats().pages_free == pages
    assert not any(t.any() for site in pool.sites.values() for t in site.slots.tensors[:8])
    pool.load("wide", random_adapter(0, 64))


def test_whoever_must_leave_for_a_gain_leaves():
    """No page is free for a gain, though a slot is: the longest unused goes, or nobody and nothing
    changes."""
    model = net(torch.bfloat16)
    size = AdapterPool.sizing(model, [8, 8], slots=4, max_rank=16)
    pool = AdapterPool(model, capacity_bytes=size.capacity_bytes, slots=4, max_rank=16)
    pool.load("a", random_adapter(0, 8)), pool.load("b", random_adapter(1, 8))
    pool.load("c", random_adapter(2, 8, dora=True))
    assert pool.names() == ["c"] and pool.stats().evictions == 2
    with pytest.raises(AdapterError, match="0: the rank may be 8, found 9"):
        pool.load("d", random_adapter(3, 9, dora=True))
    pool.update("c", random_adapter(4, 16))  # the page of its gain becomes one of ranks
    assert pool.stats().pages_free == 0 and not pool.sites["0"].shared


def test_an_8b_model():
    """The pool of the documentation: 1 GiB, 64 slots, a bf16 base with 225 linear layers."""
    model = llama_8b()
    size = AdapterPool.sizing(model, capacity_bytes=1 << 30)
    assert size == AdapterPool.sizing(model, capacity_bytes=1 << 30, slots=64, max_rank=512)
    assert size.bytes_of_tables == 64 * 225 * (64 * 4 + 12) < 4 * MIB
    assert (size.holds(16), size.holds(16, dora=True), size.holds(8), size.holds(64)) == (12, 10, 24, 3)
    assert str(size) == (
        "64 slots, 24 pages of 42.0 MiB and tables of 3.7 MiB: room for 12 LoRA or 10 DoRA adapters of rank 16 in all modules"
    )
    all_of_them = AdapterPool.sizing(model, [16] * 64)
    assert (all_of_them.slots, all_of_them.pages) == (64, 128) and round(all_of_them.capacity_bytes / MIB) == 5382


def test_repr():
    pool = AdapterPool(net(), capacity_bytes=3 * MIB, slots=8, host_bytes=MIB)
    assert repr(pool).startswith("AdapterPool(0 adapters in 8 slots, 0 pinned, 0 in use; 0.0 of 3.0 MiB; 0 on the host")
    pool.load("a", random_adapter(0, 500), pinned=True)
    pool.load("b", random_adapter(1, 8, dora=True))
    with pool.batch(["b"]):
        assert repr(pool) == (
            "AdapterPool(2 adapters in 8 slots, 1 pinned, 1 in use; 0.3 of 3.0 MiB; 2 on the host, 0.2 of 1.0 MiB)"
        )


@pytest.mark.parametrize(("ranks", "slots", "message"), [
    ([], None, "ranks must be some of 1 to 512, found"), ([8, 513], None, "ranks must be some of 1 to 512"),
    ([0], None, "ranks must be"), ([8, 8], 1, "2 adapters want as many slots, found 1"),
])  # fmt: skip
def test_sizes_that_cannot_be(ranks, slots, message):
    with pytest.raises(ValueError, match=message):
        AdapterPool.sizing(net(), ranks, slots=slots)
    for both in ({}, {"ranks": [8], "capacity_bytes": 1 << 20}):
        with pytest.raises(ValueError, match="sizing wants either ranks or capacity_bytes"):
            AdapterPool.sizing(net(), **both)
    with pytest.raises(ValueError, match="capacity_bytes must be at least "):
        AdapterPool.sizing(net(), capacity_bytes=100)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_every_backend_reads_them_from_the_pages(backend):
    """Gains and biases of six adapters in shared pages, the rest of which is NaN; also where y is
    there already."""
    if backend in missing_backends():
        pytest.skip(missing_backends()[backend])
    model = net(torch.bfloat16)
    size = AdapterPool.sizing(model, [8] * 6, dora=True, lora_bias=True, max_rank=16)
    pool = AdapterPool(model, capacity_bytes=size.capacity_bytes, slots=6, max_rank=16)
    for i in (3, 0, 5, 1, 4, 2):
        pool.load(str(i), random_adapter(i, 3 + i, dora=i % 3 != 1, bias=i % 2 == 1))
    s = pool.sites["0"].slots
    used = {row for slot in range(6) for row in rows_of(s, slot).tolist()}
    used |= {2 * (flag >> 2) + row for flag in s.flags.tolist() for row in range(2 * (flag & 3 > 0) + 2 * (flag & 3 > 1))}
    s.b[[row for row in range(len(s.b)) if row not in used]] = torch.nan
    x, (w, bias) = torch.randn(9, N_IN).bfloat16(), (model[0].weight, model[0].bias)
    plan = lambda: BatchPlan.build(torch.tensor([pool.id_of(str(i % 6)) for i in range(9)]), 6)  # noqa: E731
    with use_backend("reference"):
        wanted = multi_lora(x, w, s, plan(), bias)
    with use_backend(backend, simulate=backend in ON_GPU):
        found = multi_lora(x, w, s, plan(), bias)
        added = multi_lora_add_(torch.nn.functional.linear(x, w, bias), x, s, plan(), bias)
    for y in (found, added):
        torch.testing.assert_close(y, wanted, rtol=2e-2, atol=3e-2)


def test_slots_with_vectors_of_their_own():
    """As the plugin of vLLM has them, which writes a gain after the factors."""
    g, generation = torch.Generator().manual_seed(0), torch.zeros(3, dtype=torch.int32)
    pages = Pages(N_OUT, N_IN, torch.float32, generation, 6, 16, own_vectors=True)
    s = pages.slots
    assert s.gain.shape == s.bias.shape == (3, N_OUT)
    a, b, w = (torch.randn(shape, generator=g) for shape in ((9, N_IN), (9, N_OUT), (N_OUT, N_IN)))
    for slot in (2, 0):
        pages.put(slot, Prepared(a, b, 1.0))
        s.gain[slot], s.bias[slot] = slot + 2.0, slot + 3.0
        s.flags[slot] |= 3
    assert pages.short_of(16, 2) == 0 and len(pages.free) == 2 and not pages.shared
    x = torch.randn(2, N_IN, generator=g)
    y = multi_lora(x, w, s, BatchPlan.build(torch.tensor([2, 0]), 3))
    whole = x @ (w + b.T @ a).T
    torch.testing.assert_close(y, torch.stack([4 * whole[0] + 5, 2 * whole[1] + 3]), rtol=1e-4, atol=1e-4)
    for slot in (2, 0):
        pages.clear_slot(slot)
    assert not any(t.any() for t in s.tensors) and len(pages.free) == 6
