"""The CUDA C++ kernel of merge in the simulator: numbers, what it reads, and that its barriers and
waits are needed."""

from contextlib import nullcontext

import pytest
import torch

from lora_kernels import explain, merged_weight, use_backend
from lora_kernels.ops import cuda_alone
from lora_kernels.ops.merge import cuda as backend
from lora_kernels.ops.merge.op import MergedWeight
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc
from lora_kernels.testing import assert_within_rounding
from tests.ops.far import far

if find_nvcc() is None:
    pytest.skip(f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)

SHAPES = [(64, 64, 16), (65, 136, 17), (3, 8, 1), (70, 1048, 64), (9, 304, 128), (0, 16, 2), (5, 0, 3)]


def draw(n_out, n_in, rank, dtype):
    torch.manual_seed(0)
    w, a, b = (torch.randn(s).to(dtype) for s in ((n_out, n_in), (rank, n_in), (n_out, rank)))
    gain = torch.randn(n_out)
    return w, a, b, gain, gain.double()[:, None] * (w.double() + 0.5 * b.double() @ a.double())


@pytest.fixture
def simulated():
    with use_backend("cuda", simulate=True):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers(simulated, shape, dtype):
    w, a, b, gain, wanted = draw(*shape, dtype)
    for seed in range(2):
        with device(seed=seed) as sim:
            merged = merged_weight(w, a, b, 0.5, gain)
        assert_within_rounding(merged, wanted, dtype, 1.02)
    assert sim.counters["shared_wavefronts"] == sim.counters["shared_ideal"]
    with use_backend("triton", simulate=True):
        assert torch.equal(merged, merged_weight(w, a, b, 0.5, gain))


def test_in_place_and_into_a_slice(simulated):
    w, a, b, gain, wanted = draw(70, 1048, 20, torch.bfloat16)
    merged = merged_weight(w, a, b, 0.5, gain.half())
    wide = torch.full((70, 1064), 7.0, dtype=torch.bfloat16)
    assert merged_weight(w, a, b, 0.5, gain.half(), out=wide[:, 8:-8]).data_ptr() == wide[:, 8:].data_ptr()
    assert torch.equal(wide[:, 8:-8], merged) and (wide[:, :8] == 7).all() and (wide[:, -8:] == 7).all()
    merged_weight(w, a, b, 0.5, gain.half(), out=w)
    assert torch.equal(w, merged)


def test_w_is_read_once_and_written_once(simulated):
    w, a, b, gain, _ = draw(256, 1024, 16, torch.bfloat16)
    with device(trace=True) as sim:
        merged_weight(w, a, b, 0.5, gain)
    size = {name: t.numel() * t.element_size() for name, t in {"w": w, "a": a, "b": b, "gain": gain}.items()}
    parts = 2  # of the columns, 512 each
    assert sim.launches == 1 and sim.counters["store_bytes"] == size["w"]
    assert sim.counters["load_bytes"] == size["w"] + len(w) // 64 * size["a"] + parts * (size["b"] + 4 * size["gain"])
    assert sim.dram() == (sum(size.values()), size["w"])


@pytest.mark.parametrize("name", ["w", "a", "b"])
def test_offsets_of_64_bits(simulated, name):
    args = dict(zip("wab", draw(3, 24, 3, torch.bfloat16), strict=False))
    assert torch.equal(merged_weight(**args | {name: far(args[name])}), merged_weight(**args))


@pytest.mark.parametrize(("old", "new"), [
    ("  __syncthreads();  // all copies", "  __syncwarp();  //"),
    ("    __syncwarp();  // the warp's 16 rows are there\n", ""),
    ("cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    ("(step + STAGES - 1, steps", "(step + STAGES, steps"),
    ("row0 + r < p.rows && column < end", "row0 + r < p.rows"),
    ("row0 + r < p.rows && column < end", "column < end"),
    ("r < rows;", "true;"),
    ("", ""),
])  # fmt: skip
def test_planted_bugs(planted, simulated, old, new):
    planted("merge/cuda.cu", old, new, keep="merge_bf16_16")
    w, a, b, gain, wanted = draw(100, 328, 5, torch.bfloat16)

    def run():
        for seed in range(4):
            with device(seed=seed):
                assert_within_rounding(merged_weight(w, a, b, 0.5, gain), wanted, torch.bfloat16)

    if old:
        with pytest.raises(SimulationError, match="race|nobody wrote|not been waited for|out of bounds"):
            run()
    else:
        run()


OTHERS = {
    "float32 factors": lambda w, a, b: (w, a.float() + 1e-3, b.float() - 1e-3),
    "offset": lambda w, a, b: (w[:, 1:], a[:, 1:], b),
    "odd": lambda w, a, b: (w[:, :75], a[:, :75], b),
    "strides": lambda w, a, b: (w.T.contiguous().T, a, b.T.contiguous().T),
    "ranks": lambda w, a, b: (w, a.repeat(20, 1), b.repeat(1, 20)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", OTHERS)
def test_other_types_layouts_and_ranks(simulated, change, dtype):
    """By a kernel that takes all, in place, too; the same bits in whatever order."""
    w, a, b, gain, _ = draw(70, 144, 13, dtype)
    w, a, b = OTHERS[change](w, a, b)
    wanted = gain.double()[:, None] * (w.double() + 0.5 * b.double() @ a.double())
    merged = []
    for seed in range(2):
        with device(seed=seed, resident=1 + 2 * seed) as sim:
            merged.append(merged_weight(w, a, b, 0.5, gain))
    assert sim.launches == 3 and merged[0].equal(merged[1])
    assert_within_rounding(merged[0], wanted, dtype, 1.02)
    merged_weight(w, a, b, 0.5, gain, out=w)
    assert w.equal(merged[0])


@pytest.mark.parametrize(("old", "new"), [
    ("    __syncthreads();  // all copies", "    __syncwarp();  //"),
    ("      __syncthreads();  // this stage has been read\n", ""),
    ("cp_async_wait<1>()", "cp_async_wait<2>()"),
    ("if (m < rows && n < end)", "if (n < end)"),
    ("if (m < rows && n < end)", "if (m < rows)"),
    ("      sum = 0;\n", ""),
    ("p.a + i / 2 * p.rank * p.a_row", "p.a"),
    ("(c / 4) * rows + row + r", "row + r"),
    ("mma_m16n8k16<B>(sums[c + l], f_rest,", "if (false) mma_m16n8k16<B>(sums[c + l], f_rest,"),
    ("mma_m16n8k16<B>(sums[c + l], f, g_rest", "if (false) mma_m16n8k16<B>(sums[c + l], f, g_rest"),
    ("turn % blocks", "0 * turn"),
    ("", ""),
])  # fmt: skip
def test_planted_bugs_of_the_other_kernel(planted, simulated, old, new):
    planted("merge/cuda_any.cu", old, new, keep="merge_any_f16")
    w, a, b = (torch.randn(s) for s in ((100, 331), (45, 331), (100, 45)))
    w = 1e-2 * w.half()  # so that what is left of the factors shows
    wanted = w.double() + 0.5 * b.double() @ a.double()
    with pytest.raises((SimulationError, AssertionError)) if old else nullcontext():
        for seed in range(3):
            with device(seed=seed):
                assert_within_rounding(merged_weight(w, a, b, 0.5), wanted, torch.float16, 1.01)


def test_beside_triton_it_takes_what_its_own_kernel_is_for(monkeypatch):
    monkeypatch.setattr(cuda_alone, "missing_backends", dict)
    monkeypatch.setattr(backend, "refuse_cuda", lambda *_: None)
    w, a, b, gain, _ = draw(8, 16, 8, torch.bfloat16)
    assert backend.refusal(MergedWeight(w, a, b, 0.5, gain)) is None
    other = backend.refusal(MergedWeight(w, a.float(), b.float(), 0.5, gain))
    assert other.startswith("Triton's kernels are there: w is torch.bfloat16")


def test_it_says_what_ran(simulated):
    w, a, b, *_ = draw(8, 16, 8, torch.bfloat16)
    assert explain(merged_weight, w, a, b).decisions[0].chosen == "cuda (simulated)"
