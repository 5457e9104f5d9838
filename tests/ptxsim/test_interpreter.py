"""Triton's interpreter, mended: the same kernels as the simulator's, right numbers in every dtype,
and what it finds."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed here (requirements-dev.txt has it for Linux on x86-64)")

import triton
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.testing import triton_versions
from lora_kernels.testing.triton_interpreter import InterpreterViolation, interpret
from tests.ptxsim import triton_kernels as kernels
from tests.ptxsim.test_triton import close, descriptor_arguments, dot_arguments, empty, lora_arguments, row_norm_arguments


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", [None, 1])
def test_lora(dtype, seed):
    args, wanted = lora_arguments(50, 72, 80, dtype)
    args |= {"BM": 32, "BN": 32, "BK": 32}
    interpret(kernels.lora, (2, 3), args, [args["y"]], seed=seed)
    close(args["y"], wanted, {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 3e-3}[dtype])


@pytest.mark.parametrize(("dtype", "precision", "tolerance"), [
    (torch.float16, "ieee", 1e-6), (torch.bfloat16, "ieee", 1e-6), (torch.float32, "ieee", 1e-6), (torch.float32, "tf32", 3e-3),
])  # fmt: skip
def test_dot(dtype, precision, tolerance):
    args, wanted = dot_arguments(64, 64, 64, dtype, (32, 64, 32), precision)
    interpret(kernels.dot, (2, 1), args, [args["y"]])
    close(args["y"], wanted, tolerance)
    error = (args["y"].double() - wanted).abs().max()
    assert precision != "tf32" or error > 1e-4  # it is cut to ten bits indeed


def test_a_row_of_a_dot_does_not_depend_on_the_others():
    x, w = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    rows = []
    for tile in (16, 32, 64):
        y = empty(64, 64)
        args = {"x": x, "w": w, "y": y, "m": 64, "n": 64, "k": 64, "BM": tile, "BN": tile, "BK": 32, "PRECISION": "ieee"}
        interpret(kernels.dot, (64 // tile, 64 // tile), args, [y])
        rows.append(y)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


def test_row_norm_softmax_and_dropout():
    args, wanted = row_norm_arguments()
    interpret(kernels.row_norm, (2,), args, [args["norm"]])
    close(args["norm"], wanted, 1e-6)
    x, y = torch.randn(5, 200).bfloat16(), empty(5, 200, dtype=torch.bfloat16)
    interpret(kernels.softmax, (5,), {"x": x, "y": y, "n": 200, "B": 256}, [y])
    close(y, x.double().softmax(1), 2**-8)
    x, y = torch.randn(1000), empty(1000)
    interpret(kernels.dropout, (4,), {"x": x, "y": y, "n": 1000, "p": 0.3, "seed": 42, "B": 256}, [y])
    assert 0.65 < (y != 0).float().mean() < 0.75


def test_gather_and_split_k():
    x, a, h = torch.randn(5, 200).bfloat16(), torch.randn(3, 16, 200).bfloat16(), empty(5, 16)
    which = torch.tensor([0, 1, 2, -1, 1])
    args = {"x": x, "a": a, "which": which, "h": h, "k": 200, "R": 16, "BK": 64}
    interpret(kernels.gather, (5,), args, [h])
    close(h[2], a[2].double() @ x[2].double(), 1e-6)
    which[4] = 3
    with pytest.raises(InterpreterViolation, match=r"program \(4, 0, 0\): load out of bounds, a\+19200 of 19200 bytes"):
        interpret(kernels.gather, (5,), args, [h])
    x, w = torch.randn(64, 128).bfloat16(), torch.randn(64, 128).bfloat16()
    y = torch.zeros(64, 64)
    args = {"x": x, "w": w, "y": y, "m": 64, "n": 64, "k": 128, "ATOMIC": True, "PARTS": 2, "B": 32}
    interpret(kernels.split_k, (2, 2, 2), args, [y])
    close(y, x.double() @ w.double().T, 1e-6)
    with pytest.raises(InterpreterViolation, match=r"load of y element \d+: a race, it is written by program"):
        interpret(kernels.split_k, (2, 2, 2), {**args, "ATOMIC": False}, [y])


def test_descriptors_mask_what_is_outside():
    args, wanted = descriptor_arguments(50, 72, 80)
    interpret(kernels.descriptors, (2, 3), args, [args["y"]])
    close(args["y"], wanted, 2**-8)


@pytest.mark.parametrize(("changed", "message"), [
    ({"m": 51}, r"program \(1, 0, 0\): load out of bounds, x\+8000 of 8000 bytes"),
    ({"n": 80, "y": torch.zeros(50, 80, dtype=torch.bfloat16)}, r"program \(0, 2, 0\): load out of bounds, w\+11520 of 11520"),
    ({"y": torch.zeros(50, 64, dtype=torch.bfloat16)}, r"store out of bounds, y\+6480 of 6400 bytes"),
    ({"k": 84}, r"program \(0, 0, 0\): stride must be 16-byte aligned"),
])  # fmt: skip
def test_descriptors_of_another_shape_than_the_tensor(changed, message):
    args = descriptor_arguments(50, 72, 80)[0] | changed
    with pytest.raises(InterpreterViolation, match=message):
        interpret(kernels.descriptors, (2, 3), args, [args["y"]])


@triton.jit
def add_row(x, y, ROW: tl.constexpr):
    """By descriptors that the host made."""
    y.store([ROW, 0], x.load([ROW, 0]) + 1)


@triton.jit
def gather_rows(x, which, y, m, N: tl.constexpr):
    xs = tl.make_tensor_descriptor(x, [m, N], [N, 1], [1, N])
    ys = tl.make_tensor_descriptor(y, [8, N], [N, 1], [1, N])
    rows = tl.load(which + tl.arange(0, 8))
    ys.scatter(xs.gather(rows, 0), tl.arange(0, 8), 0)


def test_descriptors_from_the_host_and_of_many_rows():
    x, y = torch.randn(5, 32).bfloat16(), torch.zeros(5, 32, dtype=torch.bfloat16)
    args = {"x": TensorDescriptor.from_tensor(x, [2, 32]), "y": TensorDescriptor.from_tensor(y, [2, 32]), "ROW": 4}
    interpret(add_row, (1,), args, [y])
    assert torch.equal(y[4], x[4] + 1) and not y[:4].any()
    args["y"].shape = [6, 32]
    with pytest.raises(InterpreterViolation, match=r"store out of bounds, y\+320 of 320 bytes \(32 elements\)"):
        interpret(add_row, (1,), args, [y])

    which, y = torch.tensor([3, 0, 4, 4, 5, -1, 1, 2], dtype=torch.int32), empty(8, 32, dtype=torch.bfloat16)
    args = {"x": x, "which": which, "y": y, "m": 5, "N": 32}
    interpret(gather_rows, (1,), args, [y])
    assert torch.equal(y, torch.cat([x, x.new_zeros(2, 32)])[which.where(which >= 0, 5)])
    with pytest.raises(InterpreterViolation, match=r"load out of bounds, x\+320 of 320 bytes"):
        interpret(gather_rows, (1,), args | {"m": 6}, [y])


@triton.jit
def block_pointers(x, y, m, n, B: tl.constexpr, CHECK: tl.constexpr):
    xs = tl.make_block_ptr(x, (m, n), (n, 1), (0, 0), (B, B), (1, 0))
    ys = tl.make_block_ptr(y, (m, n), (n, 1), (0, 0), (B, B), (1, 0))
    for _ in range(0, n, B):
        tl.store(ys, tl.load(xs, boundary_check=CHECK) + 1, boundary_check=(0, 1))
        xs, ys = tl.advance(xs, (0, B)), tl.advance(ys, (0, B))


@pytest.mark.skipif(triton_versions.SINCE_3_9, reason="Triton has no block pointers since 3.9")
@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers():
    x, y = torch.randn(5, 20).bfloat16(), empty(5, 20, dtype=torch.bfloat16)
    args = {"x": x, "y": y, "m": 5, "n": 20, "B": 8}
    interpret(block_pointers, (1,), args | {"CHECK": (0, 1)}, [y])
    assert torch.equal(y, x + 1)
    with pytest.raises(InterpreterViolation, match=r"load out of bounds, x\+200 of 200 bytes"):
        interpret(block_pointers, (1,), args | {"CHECK": (1,)}, [y])


@triton.jit
def touch(x, y, n, shift, B: tl.constexpr, MODE: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + at, mask=at < n)
    if MODE == "shift":
        tl.store(y + at + shift, v, mask=at < n)
    elif MODE == "twice":
        tl.store(y + at // 2, v, mask=at < n)
    elif MODE == "input":
        tl.store(x + at, v, mask=at < n)
    elif MODE == "neighbour":
        tl.store(y + at, v, mask=at < n)
        tl.store(y + n + at, tl.load(y + (at + B) % n, mask=at < n), mask=at < n)
    elif MODE == "asserts":
        tl.device_assert(at < n - shift, "too many")
    elif MODE == "wraps":
        tl.store(y + (at * shift) % 8, v, mask=at < 1)


@pytest.mark.parametrize(("mode", "shift", "message"), [
    ("shift", 1, r"store out of bounds, y\+512 of 512 bytes \(1 elements\)"),
    ("shift", -1, r"store out of bounds, y-4 of 512 bytes"),
    ("twice", 0, r"stores two values to element \d+ of y at once"),
    ("input", 0, "store to x, which is not among the tensors it writes"),
    ("neighbour", 0, r"(load|store) of y element \d+: a race, it is (written|read) by"),
    ("asserts", 1, r"program \(15, 0, 0\): too many"),
    ("wraps", 2**30, "overflow"),
])  # fmt: skip
def test_violations(mode, shift, message):
    size = 256 if mode == "neighbour" else 128
    x, y = torch.randn(128), torch.zeros(size)
    # 16 programs, so that at times shift leaves 32 bits
    args = {"x": x, "y": y, "n": 128, "shift": shift, "B": 8, "MODE": mode}
    with pytest.raises((InterpreterViolation, stock.InterpreterError), match=message):
        interpret(touch, (16,), args, [y])


def test_a_store_of_one_value_twice_is_no_race():
    y = torch.zeros(128)
    interpret(touch, (16,), {"x": torch.ones(128), "y": y, "n": 128, "shift": 0, "B": 8, "MODE": "twice"}, [y])


@triton.jit
def ticket(y, counter, total, P: tl.constexpr, SEM: tl.constexpr):
    """The last program adds up what all have left."""
    p = tl.program_id(0)
    tl.store(y + p, p.to(tl.float32) + 1)
    if tl.atomic_add(counter, 1, sem=SEM) == P - 1:
        tl.store(total, tl.sum(tl.load(y + tl.arange(0, P)), 0))


@pytest.mark.parametrize("seed", [None, 3])
def test_values_passed_on_by_an_atomic(seed):
    for sem in ("acq_rel", "relaxed"):
        y, counter, total = torch.zeros(8), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
        args = {"y": y, "counter": counter, "total": total, "P": 8, "SEM": sem}
        if sem == "acq_rel":
            interpret(ticket, (8,), args, [y, counter, total], seed=seed)
            assert total.item() == 36
        else:
            with pytest.raises(InterpreterViolation, match="load of y element .: a race, it is written by program"):
                interpret(ticket, (8,), args, [y, counter, total], seed=seed)


@triton.jit
def turns(y, flag, ORDER: tl.constexpr, SEM: tl.constexpr):
    """Each program waits for its turn and adds to what the one before left."""
    p = tl.program_id(0)
    if ORDER == "poll":
        tl.atomic_poll(flag, p, sem=SEM)
    else:
        while tl.atomic_load(flag, sem=SEM) < p:
            pass
    tl.store(y, tl.load(y) + 1)
    tl.atomic_store(flag, p + 1, sem="release")


@triton.jit
def hand_over(y, flag, OVERWRITTEN: tl.constexpr):
    p = tl.program_id(0)
    if p == 0:
        tl.store(y, 1.0)
        tl.atomic_store(flag, 1, sem="release")
    elif p == 1:
        if OVERWRITTEN:
            tl.atomic_store(flag, 1, sem="relaxed")
    elif tl.atomic_load(flag, sem="acquire") == 1:
        tl.store(y + 1, tl.load(y))


needs_atomic_load = pytest.mark.skipif(not triton_versions.SINCE_3_9, reason="Triton has these atomics since 3.9")


@needs_atomic_load
def test_a_flag_that_another_store_overwrites_passes_nothing_on():
    y, flag = torch.zeros(2), torch.zeros(1, dtype=torch.int32)
    interpret(hand_over, (3,), {"y": y, "flag": flag, "OVERWRITTEN": False}, [y, flag])
    assert y.tolist() == [1, 1]
    with pytest.raises(InterpreterViolation, match=r"program \(2, 0, 0\): load of y element 0: a race"):
        interpret(hand_over, (3,), {"y": y, "flag": flag, "OVERWRITTEN": True}, [y, flag])


@triton.jit
def load_atomically(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.atomic_store(y + at, tl.atomic_load(x + at, mask=at < N - 1), mask=at < N - 1)


@needs_atomic_load
def test_atomic_loads_and_stores_of_bf16():
    x, y = torch.randn(7).bfloat16(), torch.zeros(8, dtype=torch.bfloat16)
    interpret(load_atomically, (2,), {"x": x, "y": y, "N": 8}, [y])
    assert torch.equal(y[:7], x) and y[7] == 0
    with pytest.raises(InterpreterViolation, match=r"atomic load out of bounds, x\+14 of 14 bytes"):
        interpret(load_atomically, (1,), {"x": x, "y": torch.zeros(16).bfloat16(), "N": 16}, [y])


@needs_atomic_load
@pytest.mark.parametrize("order", ["poll", "load"])
def test_atomic_loads_and_stores(order):
    y, flag = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    args = {"y": y, "flag": flag, "ORDER": order}
    interpret(turns, (5,), args | {"SEM": "acquire"}, [y, flag])
    assert y.item() == 5
    flag.zero_()
    with pytest.raises(InterpreterViolation, match=r"program \(1, 0, 0\): load of y element 0: a race, it is written by"):
        interpret(turns, (5,), args | {"SEM": "relaxed"}, [y, flag])
    flag.zero_()
    with pytest.raises(InterpreterViolation, match="atomic to flag, which is not among the tensors it writes"):
        interpret(turns, (5,), args | {"SEM": "acquire"}, [y])
    if order == "poll":
        with pytest.raises(InterpreterViolation, match="waits for a value that no program before it stored"):
            interpret(turns, (5,), args | {"flag": flag + 1, "SEM": "acquire"}, [y, flag])


@triton.jit
def add_bf16(y, x, N: tl.constexpr):
    tl.atomic_add(y + tl.arange(0, N) // 2, tl.load(x + tl.arange(0, N)), sem="relaxed")


def test_bf16_atomics_and_constants():
    x, y = torch.arange(8).bfloat16(), torch.zeros(4, dtype=torch.bfloat16)
    interpret(add_bf16, (1,), {"y": y, "x": x, "N": 8}, [y])
    assert y.tolist() == [1, 5, 9, 13]


def test_what_is_mended_is_put_back(monkeypatch):
    before = dict(stock.InterpreterBuilder.__dict__)
    y = torch.zeros(128)
    with pytest.raises(InterpreterViolation):
        interpret(touch, (16,), {"x": torch.randn(128), "y": y, "n": 128, "shift": 1, "B": 8, "MODE": "shift"}, [y])
    assert dict(stock.InterpreterBuilder.__dict__) == before

    def changed(self, a, b):
        raise AssertionError

    monkeypatch.setattr(stock.InterpreterBuilder, "create_dot", changed)
    with pytest.raises(RuntimeError, match=rf"triton {triton.__version__}: InterpreterBuilder.create_dot has parameters"):
        triton_versions.check_version()


def test_another_triton_is_refused(monkeypatch):
    triton_versions.check_version()
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.10.0")
        with pytest.raises(RuntimeError, match=r"triton 3.10.0: what is mended was tried with 3.6.0, .* only"):
            interpret(touch, (1,), {}, [])
    # a way to memory that nothing checks
    new = stock.InterpreterBuilder.create_masked_load
    with monkeypatch.context() as patch:
        patch.setattr(stock.InterpreterBuilder, "create_bulk_load", new, raising=False)
        with pytest.raises(RuntimeError, match="InterpreterBuilder.create_bulk_load touches memory and is not mended"):
            triton_versions.check_version()
    with monkeypatch.context() as patch:
        patch.delattr(stock, "_patch_lang")
        with pytest.raises(RuntimeError, match="triton.runtime.interpreter has no _patch_lang"):
            triton_versions.check_version()
