"""What the Triton kernels move and launch, in the simulator, on grids small enough for a test."""

import pytest
import torch

from lora_kernels import Member, lora_linear, lora_linear_group, use_backend, weight_norm
from lora_kernels.ops import missing_backends
from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ops.launch import recorded
from lora_kernels.ptxsim import device

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops import triton_skinny
from lora_kernels.ops.lora_linear import triton as backend

BF16 = torch.bfloat16
KIB, MIB = 1024, 2**20


@pytest.fixture(autouse=True)
def simulated():
    before = torch.are_deterministic_algorithms_enabled()
    # the memory of all tests is poisoned, which switches that on
    torch.use_deterministic_algorithms(False)
    with use_backend("triton", simulate=True):
        yield
    torch.use_deterministic_algorithms(before)


def tensors(m, k, n, r, dtype=BF16):
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(shape).to(dtype) for shape in ((m, k), (n, k), (r, k), (n, r)))
    return x.requires_grad_(), w, a.requires_grad_(), b.requires_grad_()


M, K, R = 2048, 512, 16
CACHE = 7 * MIB // 4  # holds W and a GROUP of row blocks but not x, as 50 MiB do at 8192 x 4096 x 4096


@pytest.fixture
def scaled(monkeypatch):
    """As many rows a part as on the whole grid, where fewer programs would leave multiprocessors
    without work."""
    monkeypatch.setattr(triton_skinny, "part_of_rows", lambda *_: 512)
    monkeypatch.setattr(backend, "_tile_order", lambda *sizes: {"GROUP": 4, "SLAB": 0})


def counted(layer, *args):
    """Bytes read and written behind the cache by a forward and a backward, and their launches."""
    with device(trace=True, check=False, resident=16, shuffle=False) as sim, forced_candidate("two launches"):
        made = layer(*args)
        forward = sim.launches
        with forced_candidate("fused"):
            torch.autograd.backward(made, [torch.ones_like(y) for y in made])
    return sim, (forward, sim.launches - forward)


def test_a_step_reads_each_tensor_once(scaled):
    """2MK + 1MN more than the frozen layer (F1 and dA read x, B1 reads dy), and a tenth for what is
    kept in parts; behind a cache a quarter, for the tiles that are read again."""
    x, w, a, b = tensors(M, K, K, R)
    sim, launches = counted(lambda: [lora_linear(x, w, a, b, 0.5, None, None, 0.1)])
    mk, nk = 2 * M * K, 2 * K * K
    assert launches == (2, 3)
    least = (mk + nk + mk) + (mk + nk + mk) + 3 * mk
    # no less than is possible: the count counts
    assert least <= sum(sim.dram(apart=True)) <= 1.12 * least
    # tensors on the CPU begin at multiples of 64 bytes, a GPU's of 256: in lines of 128 their
    # places would count
    assert least <= sum(sim.dram(CACHE, line=64)) <= 1.25 * least


def thin_bytes(m, k, ns, r, rows, rows_of_x):
    """Of h, P and the parts of the gradients, for a group in the order of its launches; h is in one
    part."""
    layers, blocks = len(ns), sum(-(-n // 512) for n in ns)
    # F1, F2: h; B1: h, P; dA: P, its sum; dx: that
    passes = 2 * layers + layers + 2 * blocks + 2 * layers
    parts = -(-m // rows) * sum(ns) + -(-m // rows_of_x) * layers * k
    return 4 * m * r * passes + 2 * 4 * r * parts


def test_a_group_reads_x_once_for_all(scaled):
    """q, k, v of Llama-3's ratios: 8.5 MK and the thin tensors, beside the weights; three layers
    without an adapter take 16."""
    x = torch.randn(M, K).to(BF16).requires_grad_()
    ns = (K, K // 4, K // 4)
    members = [Member(*tensors(1, K, n, R)[1:], 0.5) for n in ns]
    sim, launches = counted(lambda: lora_linear_group(x, members, 0.1))
    assert launches == (2, 3)
    mk, weights = 2 * M * K, 2 * 2 * sum(ns) * K + 8 * 2 * R * (len(ns) * K + sum(ns))
    assert sum(sim.dram(apart=True)) - weights <= 8.5 * mk + thin_bytes(M, K, ns, R, 512, 512)


def test_a_group_at_full_size():
    """By the launches that would be made: the thin tensors take less than the half MK that is left
    of 9."""
    m, k, ns = 8192, 4096, (4096, 1024, 1024)
    x = torch.empty(m, k, dtype=BF16).requires_grad_()
    members = [Member(*(torch.empty(s, dtype=BF16).requires_grad_(s[1] == R or s[0] == R) for s in ((n, k), (R, k), (n, R))))
               for n in ns]  # fmt: skip
    with recorded() as launches:
        with forced_candidate("two launches"):
            ys = lora_linear_group(x, members, 0.1)
        with forced_candidate("fused"):
            torch.autograd.backward(ys, list(map(torch.empty_like, ys)))
    shrunk, _, both, outer, _ = (launch.args for launch in launches)
    assert shrunk["SPLIT"] >= k  # h is in one part
    assert thin_bytes(m, k, ns, R, both["ROWS"], outer["ROWS"]) <= 0.5 * 2 * m * k


@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("m", [1, 16])
def test_decoding_is_one_launch(m, rank):
    x, w, a, b = tensors(m, 512, 128, rank)
    with device(trace=True) as sim, torch.no_grad():
        lora_linear(x, w, a, b, 0.5)
    assert sim.launches == 1
    read, _ = sim.dram()
    # the programs that share a tile leave their sums in the cache; W is read once
    assert read <= 1.05 * 2 * (w.numel() + a.numel() + b.numel() + x.numel()) + 4 * KIB


def test_the_norm_reads_w_once():
    _, w, a, b = tensors(1, 1024, 512, 16)
    with device(trace=True) as sim, torch.no_grad():
        weight_norm(w, a, b, 0.5)
    read, written = sim.dram()
    assert read <= 1.03 * 2 * w.numel() + 2 * (a.numel() + b.numel()) and written == 4 * len(w)
    assert sim.counters["load_bytes"] - 512 // 64 * 2 * a.numel() - 2 * b.numel() <= 1.03 * 2 * w.numel()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("gain", [False, True])
def test_what_is_kept_for_backward(dropout, gain):
    """Beside its inputs and y: h, M·r numbers, and nothing of M·N or M·K; no mask."""
    m, k, n, r = 96, 64, 80, 8
    x, w, a, b = tensors(m, k, n, r)
    g = torch.ones(n).requires_grad_() if gain else None
    y = lora_linear(x, w, a, b, 0.5, None, g, dropout, "lora_only")
    known = {t.untyped_storage().data_ptr() for t in (x, w, a, b, y, g) if t is not None}
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.untyped_storage().data_ptr() not in known]
    assert sum(t.untyped_storage().nbytes() for t in kept) <= 4 * m * r + 8  # and the seed


@pytest.mark.parametrize(("arch", "dtype"), [(80, BF16), (90, BF16), (80, torch.float32)], ids=str)
def test_bits_in_the_deterministic_mode(arch, dtype):
    """Rows alone as among others, also where dispatch would choose other forms, and shares of the
    depth, for few rows. Rounding to 16 bits hides most of another order of the sums; float32 shows
    it."""
    x, w, a, b = (t.detach() for t in tensors(70, 600, 80, 8, dtype))
    torch.use_deterministic_algorithms(True)
    try:
        with device(arch):
            whole = lora_linear(x, w, a, b, 0.5)
            for rows in (slice(0, 1), slice(33, 36), slice(3, 67)):
                assert torch.equal(lora_linear(x[rows], w, a, b, 0.5), whole[rows])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(lora_linear(x, w, a, b, 0.5), lora_linear(x, w, a, b, 0.5))
    assert torch.equal(lora_linear(x[:3], w, a, b, 0.5), lora_linear(x[:3], w, a, b, 0.5))
