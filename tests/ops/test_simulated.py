"""Triton's kernels in the simulator, end to end: ops, gradients, layers, what they read and write.
`make test-slow` runs all tests of the ops on them."""

import dataclasses

import pytest
import torch

from lora_kernels import explain, lora_linear, merged_weight, use_backend, weight_norm
from lora_kernels.nn import DoRALinear
from lora_kernels.ops import dora_gain, missing_backends, row_norm_squared
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.testing import as_layout, assert_problem, assert_within_rounding, exact, make_problem, rms, run

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

import triton
import triton.language as tl

from lora_kernels.ops import triton_dropout, triton_skinny
from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ops.dropout import _philox_words, threshold
from lora_kernels.ops.launch import launch_triton
from lora_kernels.ops.lora_linear import triton as backend
from lora_kernels.ops.lora_linear import triton_fields
from lora_kernels.ops.tables.tiles import Tile

FLAGS = {
    "lora": {}, "dora_bias": {"gain": True, "bias": True}, "dropout": {"dropout": 0.3},
    "dora_dropout_bias": {"gain": True, "bias": True, "dropout": 0.3},
    "dora_lora_only": {"gain": True, "dropout": 0.3, "dropout_semantics": "lora_only"},
}  # fmt: skip
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def simulated():
    with use_backend("triton", simulate=True):
        yield


@pytest.mark.parametrize(("dtype", "flags"), [
    *((BF16, flags) for flags in FLAGS), (F16, "lora"), (F16, "dora_dropout_bias"), (F32, "dora_bias"), (F32, "dropout"),
])  # fmt: skip
def test_values_and_gradients(dtype, flags):
    assert_problem(make_problem(70, 96, 80, 8, dtype, **FLAGS[flags]))


@pytest.mark.parametrize(("group", "slab"), [(1, 1), (2, 3), (4, 0), (8, 4), (2, 64)])
def test_every_order_of_the_tiles(monkeypatch, group, slab):
    """5 by 7 tiles forward, 5 by 6 backward: rows and columns are left over."""
    monkeypatch.setattr(backend, "_tile_order", lambda *_: {"GROUP": group, "SLAB": slab})
    small = Tile(rows=32, columns=32, depth=32, ranks=16, warps=4, stages=2)
    monkeypatch.setattr(backend, "tile", lambda kernel, x, **_: small)
    with forced_candidate("two launches"):
        assert_problem(make_problem(150, 170, 200, 5, BF16, dropout=0.3))


@pytest.mark.parametrize("shape", [(1, 17, 31, 3), (33, 130, 65, 17), (5, 3, 4, 200)], ids=str)
def test_odd_sizes(shape):
    assert_problem(make_problem(*shape, BF16, gain=True))


def test_layouts():
    problem = make_problem(9, 40, 24, 4, BF16, gain=True)
    for name, layout in {"x": "gapped_rows", "w": "transposed", "a": "offset", "b": "transposed", "dy": "every_other"}.items():
        problem = dataclasses.replace(problem, **{name: as_layout(getattr(problem, name), layout)})
    assert_problem(problem)


def test_half_a_base_and_float32_adapters():
    assert_problem(make_problem(20, 48, 40, 4, BF16, F32, gain=True))


@pytest.mark.parametrize(
    ("form", "gain", "tokens"), [("two launches", False, 128), ("two launches", True, 128), ("one pass", True, 48)]
)
def test_h_p_and_gain_keep_their_digits(form, gain, tokens):
    """None of them is rounded to 16 bits before a product: y has one rounding, and so has dx
    without a gain; what is kept in float32 has the digits of its two halves."""
    p = make_problem(tokens, 200, 136, 16, BF16, F32, gain=gain)
    p.b = 3 * p.b  # so that the adapter's digits count
    with forced_candidate(form):
        found = run(p)
    truth = exact(p).values
    for name in ("y",) if gain else ("y", "x"):
        assert_within_rounding(found[name], truth[name], BF16, 1.02, name=name)
    for name in "ab":
        assert rms(found[name] - truth[name]) <= 1e-4 * rms(truth[name]), name


@pytest.mark.parametrize(("n_out", "n_in", "rank", "dtype"), [(65, 129, 17, BF16), (31, 40, 3, F32), (9, 40, 100, F16)])
def test_norm(n_out, n_in, rank, dtype):
    check_norm(n_out, n_in, rank, dtype)


def check_norm(n_out, n_in, rank, dtype):
    torch.manual_seed(0)
    w, a, b = (torch.randn(s) for s in ((n_out, n_in), (rank, n_in), (n_out, rank)))
    w, a, b = w.to(dtype), a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
    with torch.no_grad():
        b[3] = 0
        # cancels if it can
        b[5] = -torch.linalg.lstsq(a.float().T, 2 * w[5].float()[:, None]).solution[:, 0].to(dtype)
    norm = weight_norm(w, a, b, 0.5)
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    wanted = (w.double() + 0.5 * wide[1] @ wide[0]).square().sum(1).sqrt()
    size = (w.double().square().sum(1).sqrt() + 0.5 * (wide[1].abs() @ wide[0].abs()).norm(dim=1)).detach()
    assert ((norm - wanted).abs() <= (1e-5 if dtype is F32 else 1e-4) * size).all()
    assert torch.equal(weight_norm(w, a, b, 0.5, row_norm_squared(w)), norm)
    dn = torch.randn(n_out)
    both = torch.autograd.grad(norm, (a, b), dn), torch.autograd.grad(wanted, wide, dn.double())
    for found, right in zip(*both, strict=True):
        assert (found - right).norm() <= (1e-5 if dtype is F32 else 0.01) * right.norm()


MERGES = [
    (65, 129, 17, BF16, BF16, "every_other"), (31, 40, 3, F32, F32, "transposed"), (70, 66, 130, F16, F16, "sliced_rows"),
    (9, 70, 512, BF16, F32, "gapped_rows"), (5, 7, 1, F16, F32, "offset"),
]  # fmt: skip


@pytest.mark.parametrize(("n_out", "n_in", "rank", "dtype", "kind", "layout"), MERGES)
def test_merge(n_out, n_in, rank, dtype, kind, layout):
    check_merge(n_out, n_in, rank, dtype, kind)
    check_merge(n_out, n_in, rank, dtype, kind, layout)


def check_merge(n_out, n_in, rank, dtype, kind, layout="contiguous"):
    p = make_problem(0, n_in, n_out, rank, dtype, kind, gain=layout != "contiguous")
    w = as_layout(p.w.clone(), layout)
    wanted = p.w.double() + 0.5 * p.b.double() @ p.a.double()
    wanted = wanted if p.gain is None else p.gain.double()[:, None] * wanted
    found = merged_weight(w, p.a, p.b, 0.5, p.gain)
    assert found.stride() == torch.empty_like(w).stride()
    if dtype is F32:
        assert rms(found.double() - wanted) <= 1e-6 * rms(wanted)
    else:
        assert_within_rounding(found, wanted, dtype, ideal_ratio=1.02)
    assert torch.equal(merged_weight(w, p.a, p.b, 0.5, p.gain), found)
    assert torch.equal(merged_weight(w, p.a, p.b, 0.5, p.gain, out=w), found)


@pytest.mark.parametrize(("dtype", "kind", "columns"), [(BF16, BF16, 64), (BF16, F32, 32), (F32, F32, 32)], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_merge_reads_and_writes_once(dtype, kind, columns, in_place):
    """W, A and B come from memory once and the result goes there once; W moves once between the
    cache and the blocks too."""
    n, k, r = 128, 256, 80  # more ranks than a step takes
    p = make_problem(0, k, n, r, dtype, kind)
    with device(trace=True) as sim:
        merged_weight(p.w, p.a, p.b, 0.5, out=p.w if in_place else None)
    w, a, b = (t.nbytes for t in (p.w, p.a, p.b))
    assert sim.launches == 1 and sim.counters["store_bytes"] == w
    assert sim.counters["load_bytes"] == w + n // 64 * a + k // columns * b
    read, written = sim.dram()
    assert read <= 1.03 * (w + a + b) and written == w


def test_a_layer_learns():
    """A DoRA layer, forward, backward and step, as on the reference."""
    losses = {}
    for name in ("triton", "reference"):
        torch.manual_seed(0)
        layer = DoRALinear(24, 20, r=4, lora_alpha=8)
        x, target = torch.randn(6, 24), torch.randn(6, 20)
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.02)
        losses[name] = []
        with use_backend(name, simulate=name == "triton"):
            for _ in range(3):
                loss = (layer(x) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[name].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-5)
    assert losses["triton"][-1] < losses["triton"][0]


@pytest.mark.parametrize("arch", [86, 89, 90, 120])
def test_other_architectures(arch):
    with device(arch) as sim:
        assert_problem(make_problem(130, 128, 128, 16, BF16, gain=True))
        with forced_candidate("one pass"):
            y = lora_linear(*make_problem(16, 600, 64, 8, BF16).arguments())
        check_norm(65, 128, 16, BF16)
        check_merge(65, 64, 16, BF16, F32)
    with use_backend("reference"):
        wanted = lora_linear(*make_problem(16, 600, 64, 8, BF16).arguments())
    assert (y.float() - wanted.float()).norm() <= 0.005 * wanted.float().norm()
    assert (sim.by_opcode["wgmma.mma_async"] > 0) == (arch == 90)


def test_bits():
    """Twice the same; with blocks and warps in another order; a row alone as among others."""
    problem = make_problem(70, 96, 80, 8, BF16, gain=True, bias=True, dropout=0.3)
    results = []
    for seed in (0, 0, 5):
        with device(seed=seed):
            results.append(run(problem))
    for other in results[1:]:
        assert all(torch.equal(other[name], results[0][name]) for name in results[0])
    p = make_problem(70, 96, 80, 8, BF16, gain=True)
    whole = lora_linear(*p.arguments())
    for rows in (slice(0, 1), slice(33, 36), slice(3, 67)):
        assert torch.equal(lora_linear(p.x[rows], *p.arguments()[1:]), whole[rows])


def test_what_is_read_and_written():
    """Two launches forward; x twice, W, A and B for each block of rows, y once: as the tiles of 128
    say."""
    m, k, n, r = 256, 256, 256, 16
    p = make_problem(m, k, n, r, BF16)
    with device(trace=True) as sim:
        lora_linear(*p.arguments())
    assert sim.launches == 2
    x, w, a, b, h, y = 2 * m * k, 2 * n * k, 2 * r * k, 2 * n * r, 4 * m * r, 2 * m * n
    blocks = m // 128
    assert sim.counters["load_bytes"] == x + m // 64 * a + blocks * (x + w) + blocks * (h + b)
    assert sim.counters["store_bytes"] == h + y
    read, written = sim.dram()
    assert read <= 1.01 * (x + w + a + b) and written == h + y
    assert sim.counters["shared_wavefronts"] <= 1.3 * sim.counters["shared_ideal"]


def test_explain():
    p = make_problem(3, 16, 16, 2)
    decision = explain(lora_linear, *p.arguments()).decisions[0]
    assert decision.chosen == "triton (simulated)" and decision.others["cpu"] == "triton (simulated) is forced"
    with use_backend("triton"), pytest.raises(NotImplementedError, match="cannot run on triton: its kernels run on a GPU"):
        lora_linear(*p.arguments())


def test_a_finding_is_raised(monkeypatch):
    """What the simulator finds in an op's kernel comes out of the op."""
    p = make_problem(16, 32, 32, 4, BF16)

    def launch_wider(kernel, grid, args, made, **how):
        if "forward" in str(kernel.fn):
            args = args | {"layers": (args["layers"][0]._replace(n=48),)}
        launch_triton(kernel, grid, args, made, **how)

    monkeypatch.setattr(backend, "launch_triton", launch_wider)
    with pytest.raises(SimulationError, match="out of bounds, forward_kernel_param_"):
        lora_linear(*p.arguments())


@pytest.mark.parametrize("flags", [{}, {"dropout": 0.3, "dropout_semantics": "lora_only"}])
def test_gain_of_zero(flags):
    p = make_problem(40, 70, 16, 20, F32, gain=True, **flags)
    p.gain[3] = 0
    results = run(p)
    with use_backend("reference"):
        wanted = run(dataclasses.replace(p))
    assert torch.allclose(results["gain"], wanted["gain"], rtol=1e-4, atol=1e-5)
    assert torch.equal(dora_gain(torch.ones(2), torch.tensor([0.0, 2.0])), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize(("dy", "gain"), [(1e-5, 1.0), (1e-4, 0.03), (3e4, 4.0)])
def test_float16_times_gain_keeps_its_digits(dy, gain):
    """dy ⊙ gain may leave float16 where dx does not."""
    p = make_problem(64, 64, 64, 4, F16, gain=True)
    p.dy, p.gain = (p.dy * dy).clamp(-6e4, 6e4), p.gain * gain
    size = min(1.0, 1e3 / (dy * gain))
    p.w, p.b = p.w * size, p.b * size
    found, wanted = run(p)["x"], exact(p).values["x"]
    assert (found - wanted).norm() <= 1.1 * (wanted.half() - wanted).norm()


def test_a_seed_on_the_device(monkeypatch):
    """Read by the kernel instead of passed by value: the same mask."""
    p = make_problem(9, 40, 24, 4, F32, dropout=0.4)
    by_value = run(p)
    for module in (triton_skinny, triton_fields):
        monkeypatch.setattr(module, "dropout_fields", lambda dropout, seed: (
            None if seed is None else triton_dropout.Dropout(seed, 0, threshold(dropout), 1 / (1 - dropout))
        ))  # fmt: skip
    by_address = run(dataclasses.replace(p))
    assert all(torch.equal(by_address[name], by_value[name]) for name in by_value)
    with pytest.raises(ValueError, match="lora_linear: seed must be on cpu .x. or the CPU, found meta"):
        lora_linear(*dataclasses.replace(p, seed=p.seed.to("meta")).arguments())


@triton.jit
def draw(out, drop, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = first + tl.arange(0, ROWS).to(tl.int64)
    keep = triton_dropout.dropout_mask(drop, rows, 0, ROWS, COLUMNS)
    tl.store(out + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("first", [0, 2**32 - 3, 2**33 + 5])
def test_the_mask_of_far_rows(first):
    out, seed = torch.empty(16, 64, dtype=torch.int8), torch.tensor(-(2**40) + 12345)
    drop = triton_dropout.dropout_fields(0.3, seed)
    args = {"out": out, "drop": drop, "first": first, "ROWS": 16, "COLUMNS": 64}
    launch_triton(draw, (1,), args, [out])
    row = (first + torch.arange(16))[:, None].expand(16, 16)
    group = torch.arange(16)[None, :].expand(16, 16)
    words = torch.stack(_philox_words(seed, (group, row & 0xFFFFFFFF, row >> 32, torch.zeros_like(row))), -1).reshape(16, 64)
    assert torch.equal(out.bool(), words >= threshold(0.3))


@triton.jit
def reads_what_it_makes(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.load(out + tl.arange(0, N)) + 1)


def test_what_a_kernel_makes_is_unknown_to_it():
    with pytest.raises(SimulationError, match="which nobody wrote"):
        launch_triton(reads_what_it_makes, (1,), {"out": (out := torch.zeros(64)), "N": 64}, [out])


def test_tf32_if_torch_allows_it(monkeypatch):
    p = make_problem(20, 64, 32, 4, F32)
    exact = lora_linear(*p.arguments())
    norm = weight_norm(p.w, p.a, p.b, 0.5)
    for module in (triton_skinny, backend):
        monkeypatch.setattr(module, "precision", lambda t: "tf32")
    error = (lora_linear(*p.arguments()) - exact).abs().max() / exact.abs().max()
    assert 1e-5 < error < 2e-3
    assert torch.equal(weight_norm(p.w, p.a, p.b, 0.5), norm)  # never


def test_infinities_and_negated_views():
    p = make_problem(4, 32, 16, 4, BF16)
    p.x[1, 3] = float("inf")
    with use_backend("reference"):
        wanted = lora_linear(*p.arguments())
    y = lora_linear(*p.arguments())
    assert torch.equal(y.isfinite(), wanted.isfinite())
    positive = dataclasses.replace(p, a=p.a.abs(), b=p.b.abs(), w=p.w.abs())
    # what an infinite h leaves is no NaN
    assert (lora_linear(*positive.arguments())[1] == float("inf")).all()
    negated = torch.complex(torch.zeros(4, 32), torch.ones(4, 32)).conj().imag
    q = make_problem(4, 32, 16, 4, F32)
    with pytest.raises(NotImplementedError, match="x is a negated view; resolve_neg"):
        lora_linear(negated, *q.arguments()[1:])
