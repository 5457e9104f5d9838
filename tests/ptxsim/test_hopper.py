"""What Triton makes for sm_90: copies in bulk, warps that are specialised, wgmma; and what a
removed line does to it."""

import math
import re

import pytest
import torch

from lora_kernels.ptxsim import Kernel

pytest.importorskip("triton", reason="triton is not installed here (requirements-dev.txt has it for Linux on x86-64)")

from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels.ptxsim.triton_ptx import aligned, compile_triton, simulate_triton
from tests.ptxsim import hopper_kernels as kernels
from tests.ptxsim import triton_kernels
from tests.ptxsim.test_triton import close, empty, lora_arguments, own_cache  # noqa: F401 (a fixture)

TILES = {"BM": 128, "BN": 64, "BK": 64}


def arguments(kernel, shape, dtype=torch.bfloat16, specialised=False, tiles=TILES):
    torch.manual_seed(0)
    m, n, k = shape
    x, w, y = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), empty(m, n, dtype=dtype)
    if kernel is kernels.with_descriptors:
        args = {"x": x, "w": w, "y": y, "m": m, "n": n, "k": k}
    else:
        boxes = {"dx": (x, "BM", "BK"), "dw": (w, "BN", "BK"), "dy": (y, "BM", "BN")}
        args = {name: TensorDescriptor.from_tensor(t, [tiles[a], tiles[b]]) for name, (t, a, b) in boxes.items()} | {"k": k}
    grid = (-(-m // tiles["BM"]), -(-n // tiles["BN"]))
    return args | tiles | {"SPECIALISED": specialised}, y, grid, x.double() @ w.double().T


@pytest.mark.parametrize("shape", [(256, 128, 192), (200, 136, 104), (8, 8, 8)], ids=str)
@pytest.mark.parametrize(("kernel", "arch", "specialised"), [
    (kernels.given, 90, False), (kernels.with_descriptors, 90, False), (kernels.with_descriptors, 90, True),
    (kernels.given, 120, False), (kernels.given, 80, False),
])  # fmt: skip
def test_descriptors(kernel, arch, specialised, shape):
    args, y, grid, wanted = arguments(kernel, shape, specialised=specialised)
    for late in (True, False):
        y.fill_(float("nan"))
        run = simulate_triton(kernel, grid, args, [y], arch=arch, late=late, seed=int(late))
        close(y, wanted, 2**-7)
    assert (run.by_opcode.get("cp.async.bulk.load", 0) > 0) == (arch >= 90)
    assert (run.by_opcode.get("setmaxnreg", 0) > 0) == specialised


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_descriptors_of_other_types(dtype):
    tiles = {"BM": 64, "BN": 64, "BK": 32}
    args, y, grid, wanted = arguments(kernels.given, (72, 64, 96), dtype, tiles=tiles)
    simulate_triton(kernels.given, grid, args, [y], arch=90 if dtype is torch.float16 else 120)
    close(y, wanted, 2**-9)


def without(ptx, pattern, which, instead=""):
    """The text without its line number `which` of those that match, and how many match."""
    lines = ptx.splitlines()
    found = [i for i, line in enumerate(lines) if re.search(pattern, line)]
    lines[found[which]] = instead
    return "\n".join(lines), len(found)


def errors_of(text, made, args, grid, y, wanted, seeds=2):
    kernel, found = Kernel(text), []
    scratch = aligned(made.scratch * math.prod(grid))
    for seed in range(seeds):
        y.fill_(float("nan"))
        given = made.launch_arguments(args, kernel, scratch if made.scratch else 0)
        run = kernel.launch(
            grid, (made.warps * 32,), given, [y], [scratch] if made.scratch else [], made.shared, seed=seed, tolerant=True
        )
        found += run.errors
    error = ((y.double() - wanted).abs().max() / wanted.abs().max()).item()
    return found, not error <= 2**-7


# of which kernel, the line that goes, and what is found
REMOVED = {
    "the wait of a copy": (kernels.given, "mbarrier.try_wait", "has not been waited for|nobody wrote"),
    "the bytes to expect": (kernels.given, "arrive.expect_tx", "has not been waited for|deadlock|nobody wrote|race"),
    "a copy": (kernels.given, "cp.async.bulk.tensor.2d.shared", "deadlock: waits at an mbarrier"),
    "the wait of the store": (kernels.given, r"cp.async.bulk.wait_group\s", "exit: a cp.async.bulk out of shared memory has"),
    "the proxy's fence": (kernels.given, "fence.proxy.async", None),
    "a wait of wgmma": (kernels.given, r"wgmma.wait_group\S* 0", "an accumulator of wgmma.mma_async is used before"),
}


@pytest.mark.parametrize("bug", REMOVED)
def test_a_line_that_goes(bug):
    kernel, pattern, message = REMOVED[bug]
    args, y, grid, wanted = arguments(kernel, (128, 64, 256))
    made = compile_triton(kernel, args, arch=90)
    assert errors_of(made.ptx, made, args, grid, y, wanted) == ([], False)
    count = without(made.ptx, pattern, 0)[1]
    instead = "setp.eq.b32 complete, 0, 0;" if "try_wait" in pattern else ""  # the end of its loop
    texts = [without(made.ptx, pattern, which, instead)[0] for which in range(count)]
    found = [errors_of(text, made, args, grid, y, wanted) for text in texts]
    if message is None:  # the first fence is one for an mbarrier, whose lack is not noticed
        message, found = "no fence.proxy.async after the write of", found[-1:]
    for errors, _ in found:
        assert re.search(message, "\n".join(errors)), (errors, message)


def test_a_buffer_that_is_filled_while_wgmma_reads_it():
    """wait_group 1 in the loop becomes 3: the next copy goes where a product still reads."""
    args, y, grid, wanted = arguments(kernels.given, (128, 64, 512))
    made = compile_triton(kernels.given, args, arch=90)
    weak, count = re.subn(r"(wgmma.wait_group\S*) 1;", r"\1 3;", made.ptx)
    assert count == 1
    errors, wrong = errors_of(weak, made, args, grid, y, wanted)
    assert wrong or errors


def test_operands_of_wgmma_by_cp_async_need_a_fence():
    args, wanted = lora_arguments(64, 64, 192)
    args |= {"BM": 64, "BN": 64, "BK": 64}
    made = compile_triton(triton_kernels.lora, args, 90, 4)
    y, grid = args["y"], (1, 1)
    assert errors_of(made.ptx, made, args, grid, y, wanted) == ([], False)
    count = without(made.ptx, "fence.proxy.async", 0)[1]
    for which in range(count):
        errors, _ = errors_of(without(made.ptx, "fence.proxy.async", which)[0], made, args, grid, y, wanted)
        assert any("wgmma" in each and "no fence.proxy.async after the write" in each for each in errors)
