"""The warp groups of sm_90a in the simulator: y and dx against float64, at tiles of their real
size."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from lora_kernels import explain, lora_linear, use_backend
from lora_kernels.ops import cost, dispatch, launch, tables, tuning
from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ops.dropout import mask
from lora_kernels.ops.lora_linear import cuda
from lora_kernels.ops.lora_linear import cuda_specialised as specialised
from lora_kernels.ops.lora_linear.call import Backward, Forward
from lora_kernels.ptxsim import device
from lora_kernels.ptxsim.nvcc import MISSING, OPTIONS, find_nvcc
from lora_kernels.testing import assert_problem, assert_within_rounding, make_problem
from tests.ops.interpreted import deterministic

if find_nvcc() is None:
    pytest.skip(f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EXACT = 1.02  # of the error of rounding y: h is not rounded
NONE, DROP = (0.0, None), (0.3, torch.tensor(2**40 + 3))
LORA_ONLY = {"dropout": 0.1, "dropout_semantics": "lora_only"}


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """Two blocks, so that each makes more tiles than one."""
    monkeypatch.setattr(specialised, "resident", lambda x: 2)
    with use_backend("cuda", simulate=True), deterministic(False), device(90) as sim:
        yield sim


def normal(*shape, dtype=F32, depth=1):
    return (torch.randn(shape) * depth**-0.5).to(dtype)


def y_and_z(m, k, n, r, dtype, adapters, vectors=False, parts=1):
    torch.manual_seed(0)
    x, w = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype, depth=k)
    b, h = normal(n, r, dtype=adapters), normal(parts, m, r)
    bias, gain = (normal(n, dtype=dtype), normal(n)) if vectors else (None, None)
    y, z = x.new_empty(m, n), x.new_empty(m, n) if vectors else None
    whole = h.new_empty(m, r) if parts > 1 else None
    specialised.forward(SimpleNamespace(x=x, w=w, b=b, bias=bias, gain=gain), h, y, z, whole)
    wanted_z = x.double() @ w.double().T + h.double().sum(0) @ b.double().T
    wanted_y = wanted_z * gain.double() + bias.double() if vectors else wanted_z
    return (y, wanted_y), (z, wanted_z), (whole, h)


# tiles are 128 by 256 by 64, and the ring has four stages
SHAPES = [
    (200, 520, 320, 16, BF16, BF16), (130, 392, 264, 64, F16, F16), (70, 136, 520, 5, BF16, F32), (257, 64, 8, 128, BF16, BF16),
    (129, 8, 256, 33, F16, F32), (65, 328, 72, 8, BF16, BF16),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "vectors"), [(shape, i % 2 == 1) for i, shape in enumerate(SHAPES)], ids=str)
def test_forward(simulated, shape, vectors):
    m, k, n, r, dtype, adapters = shape
    (y, wanted_y), (z, wanted_z), (whole, h) = y_and_z(*shape, vectors, parts=1 + 2 * vectors)
    assert_within_rounding(y, wanted_y, dtype, EXACT, name="y")
    if vectors:
        assert_within_rounding(z, wanted_z, dtype, EXACT, name="z")
        assert torch.equal(whole, h[0] + h[1] + h[2])
    assert simulated.by_opcode["wgmma.mma_async"] > 0
    assert simulated.counters["shared_wavefronts"] == simulated.counters["shared_ideal"]


def dx_of(m, k, n, r, dtype, adapters, drop=NONE, parts=3):
    torch.manual_seed(0)
    dy, w = normal(m, n, dtype=dtype), normal(n, k, dtype=dtype, depth=n)
    a, p = normal(r, k, dtype=adapters), normal(parts, m, r)
    dx = dy.new_empty(m, k)
    specialised.input_gradient(dy, w, a, p, drop, dx)
    term = p.double().sum(0) @ a.double()
    if drop[1] is not None:
        term *= mask(drop[1], drop[0], m, k, torch.float64, torch.device("cpu"))
    return dx, dy.double() @ w.double() + term


@pytest.mark.parametrize(("shape", "drop"), [(shape, (NONE, DROP)[i % 2]) for i, shape in enumerate(SHAPES)], ids=str)
def test_input_gradient(shape, drop):
    m, k, n, r, dtype, adapters = shape
    dx, wanted = dx_of(m, n, k, r, dtype, adapters, drop)  # n for k: as large a tile
    assert_within_rounding(dx, wanted, dtype, EXACT, name="dx")


@pytest.mark.parametrize(("rank", "dtype", "adapters", "flags"), [
    (16, BF16, BF16, {}), (16, BF16, F32, {"gain": True, "bias": True} | LORA_ONLY),
    *(pytest.param(64, F16, adapters, flags, marks=pytest.mark.slow)
      for adapters in (F16, F32) for flags in ({}, {"gain": True, "bias": True}, {"gain": True} | LORA_ONLY)),
], ids=str)  # fmt: skip
def test_a_layer_and_its_gradients(simulated, rank, dtype, adapters, flags):
    with forced_candidate("specialised"):
        assert_problem(make_problem(130, 328, 264, rank, dtype, adapters, **flags))
    assert simulated.by_opcode["setmaxnreg"] > 0


def layer(m=70, k=72, n=64, r=8, dtype=BF16):
    x, w = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype, depth=k)
    a, b = normal(r, k, dtype=dtype), normal(n, r, dtype=dtype)
    return x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_()


def step(*args):
    y = lora_linear(*(args or layer()), 0.5)
    y.backward(torch.ones(y.shape, dtype=y.dtype))


def measured(folder, m=70):
    """As if it had been the fastest for `layer()`."""
    rows = [tables.Choice(d, "bfloat16", m, 72, (64,), (8,), "specialised", {"specialised": 1e-6, "addmm": 2e-6})
            for d in ("forward", "backward")]  # fmt: skip
    tables.write_table(tables.table_for(90)._replace(gpu="a GPU", measured=True, stamp={}, choices=tuple(rows)), folder)
    return dispatch.tables_from(folder)


def test_it_runs_where_it_was_measured_to_be_the_fastest(tmp_path):
    """Both ways, and says so; elsewhere the library's GEMM does."""
    assert "specialised" not in [d.plan.winner for d in explain(step).decisions if d.plan]
    with measured(tmp_path):
        found = explain(step)
        assert [(d.chosen, d.plan.winner) for d in found.decisions] == [("cuda (simulated)", "specialised")] * 2
        assert "won: measured at m 70, k 72, n 64, r 8: specialised 1.0 µs, addmm 2.0 µs" in str(found)
        x, *others = layer()
        aside = torch.empty(70, 73, dtype=BF16)[:, :72].copy_(x.detach()).requires_grad_()
        assert "refuses: the rows of x do not begin at multiples of 16 bytes" not in str(explain(step, aside, *others))
        assert "specialised" not in [d.plan.winner for d in explain(lora_linear, aside, *others).decisions if d.plan]


def test_few_rows_in_the_deterministic_mode(tmp_path):
    """The choice is that for many rows, whatever there are, and so are a row's bits."""
    x, w, a, b = layer()
    with measured(tmp_path, dispatch.FIXED), deterministic(True), torch.no_grad():
        found = explain(lambda: [lora_linear(x[:m], w, a, b, 0.5) for m in (70, 5, 0)])
        assert [d.plan.winner for d in found.decisions] == ["specialised"] * 3
        assert torch.equal(lora_linear(x[:5], w, a, b, 0.5), lora_linear(x, w, a, b, 0.5)[:5])


@pytest.mark.parametrize("direction", cost.NAMES)
def test_it_is_timed_with_the_others(direction):
    made = tuning.candidate_calls(cost.Problem(direction, 70, 72, (64,), (8,), BF16), "cpu")
    assert list(made)[-1] == "specialised" and len(made) > 1
    made["specialised"]()  # which makes sure that it runs by that name


def test_beside_triton(monkeypatch, tmp_path):
    """CUDA C++ comes first and leaves a call to Triton's kernels, unless this was measured to be
    the fastest."""
    monkeypatch.setattr(cuda, "stands_alone", lambda: False)
    monkeypatch.setattr(cuda, "refuse_beside_triton", lambda why: why)
    given = *layer(), 0.5, None, None, 0.0, None, False
    dy = normal(70, 64, dtype=BF16)

    def refused(*needs):
        back = Backward(dy, *given, None, None, None, [*needs, 1, 1, 0, 0])
        return cuda.refusal(Forward(*given, True, False)), cuda.backward_refusal(back)

    assert refused(1) == ("Triton's addmm is the choice: many rows, and nothing was measured on such a GPU: the library's GEMM",
                          "they take three launches")  # fmt: skip
    with measured(tmp_path):
        assert refused(1) == (None, None) and refused(0) == (None, "they take three launches")


@pytest.mark.parametrize(("m", "fused", "count"), [(70, True, 1), (70, False, 1), (8, True, 0), (8, False, 1)])
def test_it_is_asked_once(monkeypatch, m, fused, count):
    """By a refusal, and by a forward; not at all for few rows that have a kernel of their own."""
    asked, refusal = [], specialised.refusal
    monkeypatch.setattr(specialised, "refusal", lambda *args: asked.append(args) or refusal(*args))
    monkeypatch.setattr(cuda, "stands_alone", lambda: False)
    x, w, a, b = (t.detach() for t in layer(m))
    # kernels in one launch want A as x is
    call = Forward(x, w, a if fused else a.float(), b, 0.5, None, None, 0.1, torch.tensor(1), False, True, False)
    for ask in (cuda.refusal, cuda.forward):
        asked.clear()
        ask(call)
        assert len(asked) == count


@pytest.mark.parametrize(("shape", "arch", "aside", "flags", "reason"), [
    ((64, 72, 64), 90, False, {}, "m is 64: it takes more than 64"),
    ((70, 76, 64), 90, False, {}, "k is 76 and n 64: it takes multiples of 8"),
    ((70, 72, 60), 90, False, {}, "k is 72 and n 60: it takes multiples of 8"),
    ((70, 72, 64), 100, False, {}, "sm_100: its code is for sm_90a"),
    ((70, 72, 64), 90, True, {}, "the rows of x do not begin at multiples of 16 bytes"),
    ((70, 72, 64), 90, False, {"gain": torch.ones(64), "dropout": 0.1}, "the base is dropped, too"),
], ids=["rows", "columns of w", "rows of w", "another GPU", "rows aside", "dropped base"])  # fmt: skip
def test_refusals_in_words(shape, arch, aside, flags, reason):
    x, *others = layer(*shape)
    if aside:
        x = torch.empty(len(x), x.shape[1] + 1, dtype=BF16)[:, :-1].copy_(x.detach()).requires_grad_()
    y = lora_linear(x, *others, 0.5, **flags)
    with device(arch), forced_candidate("specialised"):
        with pytest.raises(NotImplementedError, match=f"forward cannot run as specialised: {reason}"):
            lora_linear(x, *others, 0.5, **flags)
        if aside:
            return y.backward(torch.ones_like(y))  # which does not read x
        with pytest.raises(NotImplementedError, match=f"backward cannot run as specialised: {reason}"):
            y.backward(torch.ones_like(y))


def test_layouts_of_thin_matrices():
    """Of which no map can be made: they are copied as pairs, or there are none."""
    for r, change in ((8, lambda b: b.T.contiguous().T), (8, lambda b: b[:1].expand(b.shape)), (0, lambda b: b)):
        torch.manual_seed(0)
        x, w, h = normal(70, 72, dtype=BF16), normal(64, 72, dtype=BF16, depth=72), normal(1, 70, r)
        b, a = (change(normal(n, r, dtype=BF16)) for n in (64, 72))
        y, dx = x.new_empty(70, 64), x.new_empty(70, 72)
        specialised.forward(SimpleNamespace(x=x, w=w, b=b, bias=None, gain=None), h, y, None, None)
        assert_within_rounding(y, x.double() @ w.double().T + h[0].double() @ b.double().T, BF16, EXACT, name="y")
        dy = normal(70, 64, dtype=BF16)
        specialised.input_gradient(dy, w, a.T, h, DROP if r else NONE, dx)
        kept = mask(DROP[1], DROP[0], 70, 72, torch.float64, torch.device("cpu"))
        assert_within_rounding(dx, dy.double() @ w.double() + kept * (h[0].double() @ a.double().T), BF16, EXACT, name="dx")


def test_rows_of_which_no_map_can_be_made():
    """They overlap, or there is one and the next would begin anywhere; the address of each is a
    multiple of 16 bytes."""
    x, w, *_ = layer()
    with deterministic(True):
        for t in (x[:1].expand(70, 72), torch.empty(70, 73, dtype=BF16)[:1, :72]):
            assert "its map needs rows of 16 bytes that do not overlap" in specialised.refusal(t, w, False, {"x": t})
        assert specialised.refusal(x[:1], w, False, {"x": x[:1]}) is None


def test_a_gradient_that_is_one_number():
    """As that of y.sum() is, which autograd expands: it is copied once."""
    x, w, a, b = layer()
    with forced_candidate("specialised"):
        lora_linear(x, w, a, b, 0.5).sum().backward()
    ones = torch.ones(70, 64).double()
    wanted = ones @ w.double() + 0.5 * ones @ b.detach().double() @ a.detach().double()
    assert_within_rounding(x.grad, wanted, BF16, EXACT, name="dx")


def test_each_byte_once():
    """Behind a cache each launch reads and writes what `cost` says, and a wgmma a step of 16 is all
    that multiplies."""
    m, k, n, r = 256, 512, 512, 16
    p = cost.Problem("forward", m, k, (n,), (r,), BF16)
    _, pairs, gemm = cost.candidate_launches(p)["specialised"]
    with device(90, trace=True, check=False) as sim:
        y_and_z(m, k, n, r, BF16, BF16)
    assert sum(sim.dram(apart=True)) == pairs.bytes_moved + gemm.bytes_moved
    products = k // 16 + 2  # and h, and what is left of h, times b
    # of tiles, and of warps that multiply one
    assert sim.by_opcode["wgmma.mma_async"] == 2 * 2 * products * 8
    steps = k // 64 + 1
    assert sim.by_opcode["cp.async.bulk.load"] == 2 * 2 * steps * 2


def test_the_same_bits_in_any_order_beside_any_rows(monkeypatch):
    x, w, a, b = layer(200, 136, 328, 16)
    dy, found = normal(200, 328, dtype=BF16), []
    for seed, blocks, rows in ((0, 2, 200), (0, 2, 200), (3, 1, 200), (5, 6, 130)):
        monkeypatch.setattr(specialised, "resident", lambda x, blocks=blocks: blocks)
        with device(90, seed=seed), forced_candidate("specialised"), deterministic(True):
            part = x.detach()[:rows].requires_grad_()
            y = lora_linear(part, w, a, b, 0.5)
            y.backward(dy[:rows])
        found.append((y[:130], part.grad[:130]))
    for y, dx in found[1:]:
        assert torch.equal(y, found[0][0]) and torch.equal(dx, found[0][1])


def run_forward():
    """Three tiles a block, and more steps than the ring has stages."""
    (y, wanted), (z, wanted_z), _ = y_and_z(200, 328, 520, 40, BF16, BF16, vectors=True)
    assert_within_rounding(y, wanted, BF16, EXACT, name="y")
    assert_within_rounding(z, wanted_z, BF16, EXACT, name="z")


def run_float16():
    (y, wanted), *_ = y_and_z(130, 64, 264, 40, F16, F16)
    assert_within_rounding(y, wanted, F16, EXACT, name="y")


def run_dx():
    assert_within_rounding(*dx_of(200, 520, 328, 40, BF16, BF16, DROP), BF16, EXACT, name="dx")


RUNS = {"bf16": run_forward, "f16": run_float16, "dx_drop_bf16": run_dx}
NUMBERS = "rms error .* times that of the correctly rounded result"
FREE, BOX = "mbarrier_arrive(&shared.empty[reading]);\n      reading", "bar_sync(1 + group, GROUP);"
READ = "if (threadIdx.x % GROUP == 0) store_wait_read<1>();"
BEGIN = "  if (threadIdx.x < GROUP) {\n    setmaxnreg"
# what stands in the place of what, and what is found
BUGS = {
    "it multiplies before the copy is there": ("mbarrier_wait(&shared.full[state.stage], state.parity);", "", "nobody wrote"),
    "it copies before the stage is free": (
        "mbarrier_wait(&shared.empty[state.stage], state.parity ^ 1);", "", "a cp.async into it has not been waited for",
    ),
    "a stage is never free": (
        f"if (reading >= 0 && threadIdx.x % 32 == 0) {FREE}", "reading", "deadlock: waits at an mbarrier",
    ),
    "another stage is free": (FREE, FREE.replace("[reading]", "[state.stage]"), "deadlock: waits at an mbarrier"),
    "a group too few is waited for": ("wgmma_wait<1>(d);", "wgmma_wait<2>(d);", "cp.async.bulk .* race with a read of warp"),
    "the parity never changes": ("parity ^= 1", "parity ^= 0", "cp.async.bulk at .* shared race"),
    "the parity of the other phase": ("state.parity ^ 1", "state.parity", "deadlock: waits at an mbarrier"),
    "an arrival too few": ("empty[i], 2 * GROUP / 32)", "empty[i], 7)", "cp.async.bulk at .* race with a read of warp"),
    "bytes too few": ("expect_tx(full, STAGE_BYTES)", "expect_tx(full, STAGE_BYTES - 128)", "deadlock: waits at an mbarrier"),
    "no barriers yet": (f"  __syncthreads();\n{BEGIN}", BEGIN, "there is no mbarrier"),
    "another swizzle": ("uint64_t(1) << 62", "uint64_t(2) << 62", NUMBERS),
    "rows further apart": ("uint64_t(1024 >> 4) << 32", "uint64_t(2048 >> 4) << 32", "wgmma B at .* nobody wrote"),
    "sums that are not there yet": ("    wgmma_wait<0>(d);\n    if (thr", "    if (thr", "accumulator of wgmma.mma_async is"),
    "without what is left of h": ("a + (block + of % 2 * 2)", "a + (block + 0)", NUMBERS),
    "the same 16 ranks twice": ("i % blocks, of", "0, of", NUMBERS),
    "a box is written while it is stored": (READ, "", "stmatrix at .*: a cp.async.bulk out of it has not been waited for"),
    "the same box twice": ("boxes[group][c % 2]", "boxes[group][0]", "stmatrix at .*: a cp.async.bulk out of it has not been"),
    "others store from the box": (f"\n    {BOX}\n#pragma", "\n#pragma", "stmatrix at .* shared race with a read of warp"),
    "others write the box": (f"async();\n    {BOX}", "async();", "cp.async.bulk at .* shared race with a write of warp"),
    "writes are not shown to the copy": ("    fence_proxy_async();\n", "", "no fence.proxy.async after the write of warp"),
    "stores are not waited for": ("if (threadIdx.x % GROUP == 0) store_wait();", "", "exit: a cp.async.bulk"),
    "both groups store at one place": ("c * BOX, row, box)", "c * BOX, row & ~127, box)", "race|rms"),
    "a gain of another column": ("gain[l], j * 4 + lane % 4)", "gain[l], j * 4)", NUMBERS),
    "a bias of another row": ("sums[l + 2] = mine * sums[l + 2] + more", "sums[l + 2] = mine * sums[l + 2]", NUMBERS),
    "without what is left of b": ("* (p.split ? 3 : 2)", "* 2", NUMBERS, "f16"),
    "a step along the rows of W": ("ACROSS ? 16 * 128 >> 4", "ACROSS ? 8 * 128 >> 4", NUMBERS, "dx_drop_bf16"),
    "columns that lie elsewhere": ("(a + A_BYTES, BOX_BYTES)", "(a + A_BYTES, 1024)", NUMBERS, "dx_drop_bf16"),
    "it drops sums that are not there yet": (
        "      wgmma_wait<0>(d);\n      if (ch", "      if (ch", "accumulator of wgmma.mma_async is used", "dx_drop_bf16",
    ),
    "it drops for another row": ("odd * 8, n", "0, n", NUMBERS, "dx_drop_bf16"),
}  # fmt: skip
QUICK = ("it multiplies before the copy is there", "a stage is never free", "a group too few is waited for", "another swizzle",
         "the parity never changes", "a box is written while it is stored", "columns that lie elsewhere")  # fmt: skip


@pytest.mark.parametrize("bug", [pytest.param(bug, marks=[] if bug in QUICK else pytest.mark.slow) for bug in BUGS])
def test_planted_bugs(planted, bug):
    old, new, message, *of = BUGS[bug]
    kernel = of[0] if of else "bf16"
    planted(specialised.SOURCE, old, new, keep=f"lora_linear_specialised_{kernel}")
    with pytest.raises(AssertionError, match=message):
        RUNS[kernel]()


@pytest.mark.slow
def test_ptxas_changes_nothing(tmp_path):
    """It would say so (C7510 to C7519) where it made products wait for each other or put fences
    in."""
    source, gpu = str(launch.CSRC / specialised.SOURCE), ("-gencode", "arch=compute_90a,code=sm_90a")
    command = [str(find_nvcc()), *OPTIONS, "-cubin", *gpu, "-Xptxas", "-v", source, "-o", str(tmp_path / "cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "lora_linear_specialised_dx_drop_f16" in said and "(C75" not in said and "warning" not in said
