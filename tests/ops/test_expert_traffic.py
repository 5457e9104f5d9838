"""What the Triton kernels of experts launch and move, in the simulator."""

import pytest
import torch

from lora_kernels import expert_lora_linear, expert_weight_norm, use_backend
from lora_kernels.ops import missing_backends
from lora_kernels.ops.launch import recorded
from tests.ops.interpreted import deterministic
from tests.ops.quantised import make_experts

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from bench.traffic import MIB, count_expert_bytes

BF16 = torch.bfloat16
PRODUCT, OUTER = "expert_product_kernel", "expert_outer_kernel"


@pytest.fixture(autouse=True)
def as_usual():
    """The memory of all tests is poisoned, which switches the deterministic mode on."""
    with deterministic(False):
        yield


def launches(tokens, experts, rank=8, **how):
    """The kernels of a forward and of a backward."""
    x, w = torch.empty(tokens, 64, dtype=BF16), torch.empty(experts, 48, 64, dtype=BF16)
    a, b = torch.empty(experts, rank, 64, dtype=BF16), torch.empty(experts, 48, rank, dtype=BF16)
    vectors = [torch.ones(experts, 48).requires_grad_() for _ in range(2)] if how.get("vectors") else [None, None]
    leaves = [t.requires_grad_() for t in (x, a, b)]
    ends = torch.arange(1, experts + 1) * (tokens // experts)
    with use_backend("triton", simulate=True), recorded() as found:
        y = expert_lora_linear(x, ends, w, a, b, 0.5, *vectors)
        before = len(found)
        torch.autograd.grad(y, [*leaves, *(v for v in vectors if v is not None)], torch.empty_like(y))
    names = [one.name for one in found]
    return names[:before], names[before:]


@pytest.mark.parametrize("vectors", [False, True], ids=["lora", "dora"])
def test_launches_do_not_grow_with_the_experts(vectors):
    back = [PRODUCT, PRODUCT, OUTER, OUTER]
    for experts in (4, 32, 128):
        assert launches(64 * experts, experts, vectors=vectors) == ([PRODUCT] * 2, back)
        # of few tokens h is no launch of its own
        assert launches(2 * experts, experts, vectors=vectors) == ([PRODUCT], back)
    with deterministic(True):
        assert launches(8, 4, vectors=vectors) == ([PRODUCT] * 2, back)


def test_norms_are_one_launch():
    for kind in (None, "nested"):
        for experts in (4, 32):
            a, b = torch.empty(experts, 4, 32, dtype=BF16), torch.empty(experts, 48, 4, dtype=BF16)
            w = make_experts(kind, experts, 48, 32, BF16) if kind else torch.empty(experts, 48, 32, dtype=BF16)
            with use_backend("triton", simulate=True), recorded() as found:
                expert_weight_norm(w, a, b, 0.5)
            assert [one.name for one in found] == ["quantised_norm_kernel" if kind else "norm_kernel"]


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_a_step_moves_the_floor(arch):
    """With an empty cache for each launch; dy is read thrice, where the floor has it twice. B is
    PEFT's."""
    row = count_expert_bytes(m=256, k=256, n=192, r=8, experts=8, top=2, peft=True, arch=arch, cache=2 * MIB, line=64)
    assert row["launches"] == 6 and row["shared"] <= 1.3
    assert row["least"] <= row["apart_read"] + row["apart_written"] <= 1.1 * row["least"]
    assert row["read"] + row["written"] < row["apart_read"] + row["apart_written"]


@pytest.mark.parametrize(("m", "n", "forward"), [(64, 64, False), (16, 16, True)], ids=["step", "y"])
def test_an_index_needs_no_copy_of_x(m, n, forward):
    """The bytes of x in the place of those of a row for each of its experts."""
    shape = {"m": m, "k": 512, "n": n, "r": 8, "experts": 4, "top": 4, "forward": forward, "cache": 2 * MIB, "line": 64}
    rows = [count_expert_bytes(**shape, index=index) for index in (False, True)]
    assert [row["launches"] for row in rows] == [1 if forward else 6] * 2
    for row in rows:
        assert row["least"] <= row["apart_read"] + row["apart_written"] <= 1.15 * row["least"]
    # three rows of four less, as often as x is read
    less = 2 * 3 * m * 512 * (1 if forward else 3)
    assert rows[0]["apart_read"] - rows[1]["apart_read"] > 0.9 * less


@pytest.mark.parametrize(("m", "experts", "top"), [(1, 128, 8), (3, 8, 2), (64, 8, 2)])
def test_decoding_reads_the_weights_once(m, experts, top):
    """Those of the experts with tokens alone."""
    row = count_expert_bytes(m=m, k=256, n=128, r=16, experts=experts, top=top, forward=True, cache=2 * MIB, line=64)
    assert row["launches"] == 1 and row["hit"] <= min(m * top, experts)
    assert row["least"] <= row["read"] + row["written"] <= 1.05 * row["least"]
    assert row["shared"] <= 1.1
