"""Kernels as Triton compiles them for sm_80: right numbers, no finding, and what is wrong is
found."""

import re

import pytest
import torch

from lora_kernels.ptxsim import Kernel, SimulationError

pytest.importorskip("triton", reason="triton is not installed here (requirements-dev.txt has it for Linux on x86-64)")

from lora_kernels.ptxsim.triton_ptx import compile_triton, simulate_triton
from lora_kernels.testing.triton_interpreter import InterpreterViolation, interpret
from tests.ptxsim import problems
from tests.ptxsim import triton_kernels as kernels
from tests.ptxsim.corpus import MISSED, by_mended_interpreter, by_simulator, shaped, tiles


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Compiles anew: a cached kernel would hide what this Triton makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def close(found, wanted, tolerance):
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= tolerance, error


def empty(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def lora_arguments(m, n, k, dtype=torch.bfloat16):
    x, w, a, b = (torch.randn(shape).to(dtype) for shape in ((m, k), (n, k), (16, k), (n, 16)))
    args = {"x": x, "w": w, "a": a, "b": b, "y": empty(m, n, dtype=dtype), "m": m, "n": n, "k": k}
    args |= {"r": 16, "scale": 0.5, "R": 16}
    h = (0.5 * (x.double() @ a.double().T)).to(dtype).double()
    return args, x.double() @ w.double().T + h @ b.double().T


def dot_arguments(m, n, k, dtype, tiles, precision="ieee"):
    x, w = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    args = {"x": x, "w": w, "y": empty(m, n), "m": m, "n": n, "k": k, "PRECISION": precision}
    return args | dict(zip(("BM", "BN", "BK"), tiles, strict=True)), x.double() @ w.double()


def row_norm_arguments():
    n, k = 72, 80
    w, a, b = (torch.randn(shape).bfloat16() for shape in ((n, k), (16, k), (n, 16)))
    args = {"w": w, "a": a, "b": b, "norm": empty(n), "n": n, "k": k, "scale": 0.5, "R": 16, "BN": 64, "BK": 32}
    return args, torch.linalg.vector_norm(w.double() + 0.5 * b.double() @ a.double(), dim=1)


def descriptor_arguments(m, n, k):
    x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    args = {"x": x, "w": w, "y": empty(m, n, dtype=torch.bfloat16), "m": m, "n": n, "k": k, "BM": 32, "BN": 32, "BK": 32}
    return args, x.double() @ w.double().T


@pytest.mark.parametrize("shape", [(128, 128, 128), (100, 144, 80), (130, 72, 208)], ids=str)
@pytest.mark.parametrize(("tiles", "warps", "stages"), [((128, 128, 64), 8, 3), ((32, 64, 32), 4, 2), ((16, 32, 64), 1, 4)])
def test_lora(shape, tiles, warps, stages):
    args, wanted = lora_arguments(*shape)
    args |= dict(zip(("BM", "BN", "BK"), tiles, strict=True))
    grid = (-(-shape[0] // tiles[0]), -(-shape[1] // tiles[1]))
    for seed in range(2):
        run = simulate_triton(kernels.lora, grid, args, [args["y"]], warps=warps, stages=stages, seed=seed)
        close(args["y"], wanted, 2**-7)
        assert run.counters["mma"] > 0 and run.counters["shared_wavefronts"] <= 1.3 * run.counters["shared_ideal"]


@pytest.mark.parametrize("arch", [80, 86, 89, 120])
def test_other_architectures(arch):
    args, wanted = lora_arguments(64, 64, 64)
    args |= {"BM": 64, "BN": 64, "BK": 32}
    simulate_triton(kernels.lora, (1, 1), args, [args["y"]], arch=arch)
    close(args["y"], wanted, 2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tiles", [(64, 64, 64), (64, 128, 32), (128, 64, 64), (64, 32, 16)])
def test_hopper(dtype, tiles):
    """wgmma: operands in shared memory with every swizzle, in registers, and transposed."""
    args, wanted = lora_arguments(128, 128, 192, dtype)
    args |= dict(zip(("BM", "BN", "BK"), tiles, strict=True))
    run = simulate_triton(kernels.lora, (128 // tiles[0], 128 // tiles[1]), args, [args["y"]], arch=90, warps=tiles[0] // 16)
    close(args["y"], wanted, 2**-7)
    assert run.by_opcode["wgmma.mma_async"] > 0
    m, n, k = tiles
    args, wanted = dot_arguments(m, n, 2 * k, dtype, tiles)
    simulate_triton(kernels.dot, (1, 1), args, [args["y"]], arch=90, warps=m // 16)
    close(args["y"], wanted, 1e-5)


@pytest.mark.parametrize(("dtype", "precision", "tolerance"), [
    (torch.float16, "ieee", 1e-5), (torch.bfloat16, "ieee", 1e-5), (torch.float32, "tf32", 3e-3), (torch.float32, "ieee", 1e-5),
])  # fmt: skip
@pytest.mark.parametrize("warps", [1, 4, 8])
def test_dot(dtype, precision, tolerance, warps):
    args, wanted = dot_arguments(64, 64, 64, dtype, (32, 64, 32), precision)
    simulate_triton(kernels.dot, (2, 1), args, [args["y"]], warps=warps)
    close(args["y"], wanted, tolerance)


def test_row_norm():
    args, wanted = row_norm_arguments()
    simulate_triton(kernels.row_norm, (2,), args, [args["norm"]])
    close(args["norm"], wanted, 1e-6)


def test_descriptors():
    args, wanted = descriptor_arguments(50, 72, 80)
    simulate_triton(kernels.descriptors, (2, 3), args, [args["y"]])
    close(args["y"], wanted, 2**-8)


def sum_of_rows_arguments():
    first, second, third = torch.randn(128), torch.randn(300)[1:], torch.randn(100)
    bounds = kernels.Bounds(-0.5, torch.tensor([0.25]))
    rows = tuple(kernels.Row(*row) for row in (
        (first, None, 128, 1, 2.0), (second, bounds, 128, 2, 0.5), (third, None, 100, 1, 1.0),
    ))  # fmt: skip
    wanted = 2.0 * first.double() + 0.5 * second[:256:2].double().clamp(-0.5, 0.25)
    wanted[:100] += third
    return {"y": empty(128), "rows": rows, "ROWS": 3, "N": 128}, wanted


def test_tuples_of_named_tuples():
    """Read by name; what is None or 1 there is no parameter, and what divides by 16 is known to."""
    args, wanted = sum_of_rows_arguments()
    made = compile_triton(kernels.sum_of_rows, args)
    assert made.arguments == (
        ("y",), ("rows", 0, 0), ("rows", 0, 2), ("rows", 0, 4), ("rows", 1, 0), ("rows", 1, 1, 0), ("rows", 1, 1, 1),
        ("rows", 1, 2), ("rows", 1, 3), ("rows", 1, 4), ("rows", 2, 0), ("rows", 2, 2), ("rows", 2, 4),
    )  # fmt: skip
    for found in (simulate_triton, interpret):
        args["y"].fill_(float("nan"))
        found(kernels.sum_of_rows, (1,), args, [args["y"]])
        close(args["y"], wanted, 1e-6)
    for at, wide in ((torch.randn(128), True), (torch.randn(129)[1:], False)):
        one = args | {"rows": (args["rows"][0]._replace(at=at),), "ROWS": 1}
        assert ("ld.global.v4" in compile_triton(kernels.sum_of_rows, one, warps=1).ptx) == wide
    short = args | {"rows": (*args["rows"][:2], args["rows"][2]._replace(n=101))}
    with pytest.raises(InterpreterViolation, match=r"load out of bounds, rows\[2\].at\+400 of 400 bytes"):
        interpret(kernels.sum_of_rows, (1,), short, [args["y"]])


def test_split_k_needs_its_atomics():
    x, w = torch.randn(64, 128).bfloat16(), torch.randn(64, 128).bfloat16()
    for atomic in (True, False):
        y = torch.zeros(64, 64)
        args = {"x": x, "w": w, "y": y, "m": 64, "n": 64, "k": 128, "ATOMIC": atomic, "PARTS": 2, "B": 32}
        if atomic:
            simulate_triton(kernels.split_k, (2, 2, 2), args, [y])
            close(y, x.double() @ w.double().T, 1e-6)
        else:
            with pytest.raises(SimulationError, match="race on split_k_param_2"):
                simulate_triton(kernels.split_k, (2, 2, 2), args, [y])


def test_gather():
    tokens, k, adapters = 9, 200, 3
    x, a = torch.randn(tokens, k).bfloat16(), torch.randn(adapters, 16, k).bfloat16()
    which = torch.tensor([0, 1, 2, -1, 1, 0, 2, 2, -1])
    h = empty(tokens, 16)
    args = {"x": x, "a": a, "which": which, "h": h, "k": k, "R": 16, "BK": 64}
    simulate_triton(kernels.gather, (tokens,), args, [h])
    for token, adapter in enumerate(which.tolist()):
        if adapter < 0:
            assert (h[token] == 0).all()
        else:
            close(h[token], a[adapter].double() @ x[token].double(), 1e-6)
    # an adapter that is not there
    which[4] = 3
    with pytest.raises(SimulationError, match=r"ld: out of bounds, gather_param_1\+\d+ of 19200 bytes"):
        simulate_triton(kernels.gather, (tokens,), args, [h])


def test_dropout_and_softmax():
    x, y = torch.randn(1000), empty(1000)
    simulate_triton(kernels.dropout, (4,), {"x": x, "y": y, "n": 1000, "p": 0.3, "seed": 42, "B": 256}, [y])
    kept = y != 0
    assert 0.65 < kept.float().mean() < 0.75
    close(y[kept], (x / 0.7)[kept].double(), 1e-6)
    x, y = torch.randn(5, 200).bfloat16(), empty(5, 200, dtype=torch.bfloat16)
    simulate_triton(kernels.softmax, (5,), {"x": x, "y": y, "n": 200, "B": 256}, [y])
    close(y, x.double().softmax(1), 2**-8)


def test_a_program_that_passes_values_through_memory():
    x, scratch = torch.arange(1024.0), torch.zeros(1024)
    for barrier in (True, False):
        y = empty(1024)
        args = {"x": x, "scratch": scratch, "y": y, "n": 1024, "B": 1024, "BARRIER": barrier}
        if barrier:
            simulate_triton(kernels.through_memory, (1,), args, [y], poisoned=[scratch])
            assert torch.equal(y, x.flip(0))
        else:
            with pytest.raises(SimulationError, match="race on|nobody wrote"):
                simulate_triton(kernels.through_memory, (1,), args, [y], poisoned=[scratch])


def test_each_barrier_of_the_product_is_needed():
    """The PTX with one bar.sync taken out: found at all but those that are not needed."""
    args, _ = lora_arguments(128, 64, 256)
    args |= {"BM": 64, "BN": 64, "BK": 32}
    made = compile_triton(kernels.lora, args, warps=4, stages=3)
    lines = made.ptx.splitlines()
    barriers = [i for i, line in enumerate(lines) if re.search(r"\bbar\.sync\b", line)]
    found = []
    for gone in barriers:
        kernel = Kernel("\n".join(line if i != gone else "" for i, line in enumerate(lines)))
        errors = []
        for seed in range(3):
            given = made.launch_arguments(args, kernel)
            run = kernel.launch((2, 1), (128,), given, [args["y"]], shared=made.shared, tolerant=True, seed=seed)
            errors += run.errors
        found.append(bool(errors))
    assert len(barriers) >= 4
    assert found.count(False) <= 1, found


@pytest.mark.parametrize("case", [
    *(shaped("vector_add", (tiles(n, 128),), problems.add, n) for n in (1, 128, 1000)),
    *(shaped("lora", (2, 2), problems.lora, 33, 40, k, r) for k, r in ((1, 1), (64, 8), (72, 16))),
    *(shaped("split_k_ticket", (1, 2, 4), problems.ticket, 7, 64, k, 4, 2) for k in (1, 128, 130)),
    *(shaped("gather", (5,), problems.gather, [0, -1, 4, 3, -1], k, 5) for k in (1, 64, 129)),
    *(shaped("dropout_rows", (1, rows), problems.dropped, rows, n, p) for rows, n, p in ((3, 1, 0.5), (7, 256, 0.9))),
    *(shaped("softmax", (rows,), problems.softmax, rows, n) for rows, n in ((1, 1), (3, 256), (2, 129))),
], ids=lambda case: f"{case.kernel}-{case.problem.args}")  # fmt: skip
def test_shapes_with_ragged_edges(case):
    """Right numbers, the same bits in every order of blocks and warps, no finding."""
    assert by_simulator(case) == (MISSED, "")
    assert by_mended_interpreter(case) == (MISSED, "")
