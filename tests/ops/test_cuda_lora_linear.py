"""The CUDA C++ kernels of lora_linear in the simulator: numbers, bits, what they read, and that
their waits are needed."""

from contextlib import nullcontext

import pytest
import torch

from lora_kernels import explain, lora_linear, use_backend
from lora_kernels.ops import launch
from lora_kernels.ops.lora_linear import cuda, cuda_small
from lora_kernels.ops.lora_linear import cuda_skinny as skinny
from lora_kernels.ops.lora_linear.call import Forward
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc
from lora_kernels.testing import assert_within_rounding
from tests.ops.far import far
from tests.ops.interpreted import deterministic

if find_nvcc() is None:
    pytest.skip(f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)

EXACT = 1.02  # of the error of rounding y: h is not rounded
HALVES = [torch.bfloat16, torch.float16]
# m, k, n, r: each width of the product, edges of tiles and of parts, several tiles of A, ranks that
# are no multiple of 8
SMALL = [
    (1, 64, 64, 16), (5, 264, 136, 17), (8, 2056, 72, 8), (9, 512, 65, 33), (16, 1096, 200, 64), (31, 320, 203, 80),
    (33, 128, 64, 129), (64, 776, 130, 5),
]  # fmt: skip
LARGE = [(65, 64, 128, 16), (70, 2056, 64, 5), (130, 200, 203, 33), (300, 72, 136, 130), (256, 1032, 256, 64)]


def draw(m, k, n, r, dtype):
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(s) for s in ((m, k), (n, k), (r, k), (n, r)))
    return [t.to(dtype) for t in (x, w * max(k, 1) ** -0.5, a * max(k, 1) ** -0.5, b * r**-0.5)]


def exact(x, w, a, b, scale, bias=None, gain=None):
    x, w, a, b = (t.double() for t in (x, w, a, b))
    z = x @ w.T + scale * (x @ a.T) @ b.T
    return z * (1 if gain is None else gain.double()) + (0 if bias is None else bias.double())


@pytest.fixture
def simulated():
    """Not deterministic, so that W is read in parts; the memory of all tests is poisoned, which
    switches that on."""
    with use_backend("cuda", simulate=True), deterministic(False):
        yield


@pytest.fixture
def fixed():
    """A row's bits must not depend on the other rows, so that many tokens take our GEMM."""
    with use_backend("cuda", simulate=True), deterministic(True):
        yield


@pytest.fixture
def short_parts(monkeypatch):
    """W in parts of 64 columns, as small matrices never come."""
    monkeypatch.setattr(cuda_small, "split_k_part", lambda *_: 64)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_numbers(simulated, monkeypatch, shape, dtype):
    args = draw(*shape, dtype)
    bias, gain = torch.randn(shape[2]).to(dtype), torch.randn(shape[2])
    for seed, vectors in enumerate([(None, None), (bias, gain), (bias.float(), gain.half())]):
        monkeypatch.setattr(cuda_small, "split_k_part", lambda *_, part=64 << seed: part)
        with device(seed=seed) as sim:
            y = lora_linear(*args, 0.5, *vectors)
        assert_within_rounding(y, exact(*args, 0.5, *vectors), dtype, EXACT, name="y")
        assert sim.launches == 1
        assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_numbers_of_many_tokens(fixed, shape, dtype):
    """Two launches, with dropout too."""
    args = draw(*shape, dtype)
    bias, gain = torch.randn(shape[2]).to(dtype), torch.randn(shape[2])
    for seed, vectors in enumerate([(None, None), (bias, gain), (bias.float(), gain.half())]):
        dropout = {"dropout": 0.1 * seed, "dropout_semantics": "lora_only", "seed": torch.tensor(2**40 + seed)}
        with device(seed=seed) as sim:
            y = lora_linear(*args, 0.5, *vectors, **dropout)
        assert sim.launches == 2
        assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]
        wide = (t if t is None else t.double() for t in (*args, *vectors))
        x, w, a, b, bias_, gain_ = wide
        with use_backend("reference"):
            wanted = lora_linear(x, w, a, b, 0.5, bias_, gain_, **dropout)
        assert_within_rounding(y, wanted, dtype, EXACT, name="y")


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", ["x", "w", "a", "b"])
def test_offsets_of_64_bits(simulated, name, dropout):
    """In one launch and, with dropout, in two."""
    args = dict(zip("xwab", draw(3, 24, 3, 3, torch.bfloat16), strict=True))
    kept = {"dropout": dropout, "seed": torch.tensor(1)}
    assert torch.equal(lora_linear(**args | {name: far(args[name])}, **kept), lora_linear(**args, **kept))


@pytest.mark.parametrize("arch", [90, 120])
def test_other_architectures(fixed, arch):
    """From sm_90 on the second launch waits for the first one itself."""
    for shape in ((9, 512, 65, 33), (130, 200, 136, 33)):
        args = draw(*shape, torch.bfloat16)
        with device(arch=arch) as sim:
            y = lora_linear(*args, 0.5)
        assert_within_rounding(y, exact(*args, 0.5), torch.bfloat16, EXACT, name="y")
        assert ("griddepcontrol" in " ".join(sim.by_opcode)) == (shape[0] > 64)


def test_a_seed_on_the_device(simulated):
    """Where a kernel reads the seed itself, the mask is that of the same seed by value."""
    x, w, a, b = draw(70, 64, 64, 16, torch.bfloat16)
    h = [skinny.shrink(x, a, 0.5, (0.3, torch.tensor(5)))[0]]
    launched = []
    real = skinny.launch_cuda
    with pytest.MonkeyPatch.context() as patch:

        def on_device(source, kernel, grid, threads, args, *rest, **more):
            launched.append(kernel)
            args = args | {"dropout.at": torch.tensor(5), "dropout.seed": 0}
            real(source, kernel, grid, threads, args, *rest, **more)

        patch.setattr(skinny, "launch_cuda", on_device)
        h.append(skinny.shrink(x, a, 0.5, (0.3, torch.tensor(7)))[0])
    assert launched == ["lora_linear_shrink_drop_bf16_16"] and torch.equal(*h)


@pytest.mark.parametrize("shape", [(9, 128, 70, 20), (130, 2056, 136, 20)], ids=str)
def test_what_backward_needs(fixed, shape):
    """h in float32, of many tokens the sum of its parts, and, where y does not tell it, z."""
    x, w, a, b = draw(*shape, torch.bfloat16)
    bias, gain = torch.randn(len(w)), torch.randn(len(w))
    y, h, z = cuda.forward(Forward(x, w, a, b, 0.5, bias, gain, 0.0, None, False, True, True))
    torch.testing.assert_close(h.double(), 0.5 * x.double() @ a.double().T, rtol=1e-6, atol=1e-6)
    assert_within_rounding(z, exact(x, w, a, b, 0.5), torch.bfloat16, EXACT, name="z")
    assert_within_rounding(y, exact(x, w, a, b, 0.5, bias, gain), torch.bfloat16, EXACT, name="y")


@pytest.mark.parametrize("shape", [(0, 64, 64, 4), (2, 64, 0, 4), (3, 0, 64, 4), (80, 0, 64, 4), (80, 64, 0, 4)], ids=str)
def test_nothing_to_do(simulated, shape):
    args = draw(*shape, torch.bfloat16)
    y = lora_linear(*args, 0.5, torch.ones(shape[2]))
    assert torch.equal(y, torch.ones(shape[0], shape[2], dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_beyond_float16(simulated, dtype):
    """h overflows float16, and what is left of a small h is below its least number: both count."""
    x, w, a, b = draw(8, 64, 64, 16, dtype)
    for factor in (2.0**9, 2.0**-9):
        big, small = a * factor, b / factor
        y = lora_linear(x * 64, w, big, small, 8.0)
        assert_within_rounding(y, exact(x * 64, w, big, small, 8.0), dtype, EXACT, name="y")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_parts_come_in_any_order(simulated, short_parts, dtype):
    """Whoever ends a tile, and whether h is there by then, the bits are the same."""
    args = draw(6, 2560, 128, 70, dtype)
    seen = []
    for seed in range(6):
        with device(seed=seed, resident=1 + 3 * (seed % 2)):
            seen.append(lora_linear(*args, 0.5))
    with device(shuffle=False):
        seen.append(lora_linear(*args, 0.5))
    assert all(torch.equal(y, seen[0]) for y in seen)


@pytest.mark.parametrize("m", [64, 130])
def test_a_row_among_others(simulated, m):
    """In the deterministic mode a row's bits do not depend on how many come with it; NaN in one
    stays there."""
    x, w, a, b = draw(m, 520, 136, 20, torch.bfloat16)
    bias, gain = torch.randn(136), torch.randn(136)
    x[50] = float("nan")
    with deterministic(True):
        y = lora_linear(x, w, a, b, 0.5, bias, gain)
        for first, count in ((7, 1), (3, 9), (20, 30)):
            assert torch.equal(lora_linear(x[first : first + count], w, a, b, 0.5, bias, gain), y[first : first + count])
    assert y[50].isnan().all() and not y[:50].isnan().any() and not y[51:].isnan().any()


def test_bits_of_triton():
    """bfloat16 on sm_80, without dropout. (In float16 Triton adds h Bᵀ of 16 ranks up before it
    adds it to the sum; with dropout our lanes take neighbours, which are added in another
    order.)"""
    for shape in ((3, 192, 128, 5), (33, 1280, 64, 40), (5, 2304, 64, 16), (130, 1096, 136, 33)):
        args, vectors = draw(*shape, torch.bfloat16), (torch.randn(shape[2]), torch.randn(shape[2]))
        with use_backend("triton", simulate=True), deterministic(True):
            wanted = lora_linear(*args, 0.5, *vectors)
        with use_backend("cuda", simulate=True), deterministic(True):
            assert torch.equal(lora_linear(*args, 0.5, *vectors), wanted)


@pytest.mark.parametrize("m", [4, 16, 64])
def test_what_is_read(simulated, m):
    x, w, a, b = draw(m, 1024, 512, 16, torch.bfloat16)
    with device(trace=True) as sim:
        y = lora_linear(x, w, a, b, 0.5)
    inputs, outputs = sum(t.numel() * 2 for t in (x, w, a, b)), y.numel() * 2
    read, written = sim.dram()
    blocks = 512 // 64 * 4 + 1  # W in four parts, A in one
    scratch = blocks * 64 * (16 if m <= 16 else 64) * 4
    assert inputs <= read <= inputs + 64  # the tickets, and h as it stands
    assert written <= outputs + m * 16 * 4 + scratch + 64
    # every block reads its columns of x; the last of each tile its sums, B and h
    of_x = x.numel() * 2 * (512 // 64 + 1)
    ends = 512 // 64 * (64 * 16 * 2 + m * 16 * 4)
    assert sim.counters["load_bytes"] <= (w.numel() + a.numel()) * 2 + of_x + scratch + ends + 4 * blocks
    assert sim.counters["load_sectors"] * 32 <= 1.05 * sim.counters["load_bytes"]


def test_what_is_read_for_many_tokens(fixed):
    x, w, a, b = draw(256, 1024, 384, 16, torch.bfloat16)
    with device(trace=True, shuffle=False) as sim:
        y = lora_linear(x, w, a, b, 0.5)
    size = {name: t.numel() * t.element_size() for name, t in {"x": x, "w": w, "a": a, "b": b, "y": y}.items()}
    h = 256 * 16 * 4
    assert sim.launches == 2 and sim.dram() == (sum(size[name] for name in "xwab"), size["y"] + h)
    tiles_of_x, tiles_of_w = 384 // 128, 256 // 128
    shrink = size["x"] + 256 // 64 * size["a"]
    tiles = tiles_of_x * (size["x"] + h) + tiles_of_w * (size["w"] + size["b"])
    assert sim.counters["load_bytes"] == shrink + tiles
    # h in two halves of each sector
    assert sim.counters["load_sectors"] * 32 <= 1.05 * sim.counters["load_bytes"]


@pytest.mark.parametrize(("old", "new"), [
    ("  __syncthreads();  // all copies", "  __syncwarp();  //"),
    ("cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    ("(step + STAGES - 1, steps", "(step + STAGES, steps"),
    ("__syncthreads();  // the tiles have been read", ";"),
    ("  __syncthreads();  // the tile has been read\n", ""),
    ("__shared__ int is_last;\n  __syncthreads();", "__shared__ int is_last;\n"),
    ("is_last_block(p.tickets + a_tiles + tile, w_parts + 1)", "is_last_block(p.tickets + a_tiles + tile, w_parts)"),
    ("if (is_last) *ticket = 0;", ""),
    ("      p.tickets[a_tiles + mine] = 0;\n", ""),
    ("if (rank < p.r && token < p.m)", "if (rank < p.r)"),
    ("if (token < p.m && row + c * 8 < p.n)", "if (token < p.m)"),
    ("row % 8 : row % 4 * 2", "0 : 0"),
    ("inside ? PIECE : 0);\n  }\n}\n\n// sums [16", "PIECE);\n  }\n}\n\n// sums [16"),
    ("b_tile, h_rest, i", "b_tile, h_tile, i"),
    ("isinf(to_float(high)) ? 0.f : ", ""),
    ("", ""),
])  # fmt: skip
def test_planted_bugs(planted, simulated, short_parts, old, new):
    """Races, waits and bounds are named; a missing swizzle shows in the passes of shared memory,
    others in the numbers."""
    planted(cuda_small.SMALL, old, new, keep="lora_linear_small_bf16_16")
    args = draw(13, 1032, 136, 70, torch.bfloat16)
    if "isinf" in old:
        args[2][0] = 1e38
    if "PIECE" in old:  # what is read in the place of zeros would meet zeros, but for this
        args[0][0] = torch.inf
    wanted = exact(*args, 0.5)
    with pytest.raises((SimulationError, AssertionError)) if old else nullcontext():
        for seed in range(6):
            with device(seed=seed) as sim:
                y = lora_linear(*args, 0.5)
            assert not launch.tile_tickets(y.device, 16).any()
            assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]
            assert_within_rounding(y[1:], wanted[1:], torch.bfloat16, EXACT)


@pytest.mark.parametrize(("source", "old", "new"), [
    (skinny.THIN, "  __syncthreads();  // all copies", "  __syncwarp();  //"),
    (skinny.THIN, "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    (skinny.THIN, "(step + STAGES - 1, steps", "(step + STAGES, steps"),
    (skinny.THIN, "if (t < p.m && r < p.r)", "if (t < p.m)"),
    (skinny.THIN, "t = token + row + i * 8;", "t = token + row;"),
    (skinny.THIN, "column + step * 16 + lane % 4 * 4;", "column + step * 4 + lane % 4 * 4;"),
    (skinny.THIN, "DROPS ? Swizzle::PAIRS", "DROPS ? Swizzle::EIGHT"),
    (cuda.TILES, "  __syncthreads();  // all copies", "  __syncwarp();  //"),
    (cuda.TILES, "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    (cuda.TILES, "(step + STAGES - 1, steps", "(step + STAGES, steps"),
    (cuda.TILES, "__syncthreads();  // the tiles have been read", ";"),
    (cuda.TILES, "  __syncthreads();  // what was there has been read\n", ""),
    (cuda.TILES, "row + r < m && column + c * 8 < n", "row + r < m"),
    (cuda.TILES, "row + r < m && column + c * 8 < n", "column + c * 8 < n"),
    (cuda.TILES, "multiply(sums, h_rest, b_tile, i);", ""),
    (cuda.TILES, "tile %= slab * tile_rows;", ""),
    (cuda.TILES, "steps, p.parts, p.m * p.r", "steps, 1, p.m * p.r"),
    (cuda.TILES, "", ""),
])  # fmt: skip
def test_planted_bugs_of_many_tokens(planted, monkeypatch, fixed, source, old, new):
    planted(source, old, new, keep="lora_linear_shrink_drop_bf16_16" if source == skinny.THIN else "lora_linear_tiles_bf16")
    monkeypatch.setattr(cuda.cost, "tile_order", lambda *_: (2, 1))
    x, w, a, b = draw(200, 1032, 200, 20, torch.bfloat16)
    dropout = {"dropout": 0.25, "dropout_semantics": "lora_only", "seed": torch.tensor(3)}
    a, b = a[:13], b[:, :13]  # one width of `shrink`
    with use_backend("reference"):
        wanted = lora_linear(x.double(), w.double(), a.double(), b.double(), 2.0, **dropout)
    with pytest.raises((SimulationError, AssertionError)) if old else nullcontext():
        for seed in range(4):
            with device(seed=seed) as sim:
                y = lora_linear(x, w, a, b, 2.0, **dropout)
            assert sim.counters["shared_wavefronts"] <= 1.05 * sim.counters["shared_ideal"]
            assert_within_rounding(y, wanted, torch.bfloat16, EXACT)


def test_what_is_refused(simulated):
    x, w, a, b = draw(4, 16, 24, 8, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="cannot run on cuda: x is torch.float32; the kernels read bfloat16"):
        lora_linear(x.float(), w.float(), a, b)
    with pytest.raises(NotImplementedError, match="cannot run on cuda: a is torch.float64; the kernels read float32"):
        lora_linear(x, w, a.double(), b.double())


def test_it_says_what_ran(simulated):
    assert explain(lora_linear, *draw(4, 16, 24, 8, torch.bfloat16)).decisions[0].chosen == "cuda (simulated)"
