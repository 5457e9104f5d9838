"""Triton's kernels on a simulated sm_90, with the tiles that large layers get, and more steps than
a loop has stages: what `wgmma` reads must stay as it is until it was read, and be fenced
(lora_kernels/ops/triton_compiler.py)."""

import dataclasses

import pytest
import torch

from lora_kernels import dora_linear, lora_linear, lora_linear_group, use_backend
from lora_kernels.ops import missing_backends
from lora_kernels.ptxsim import device
from lora_kernels.testing import as_layout, assert_group, assert_problem, check, make_problem
from tests.ops.interpreted import deterministic

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ops.multi_lora import multi_lora
from tests.ops.test_multi_lora import assert_exact, draw, planned
from tests.ops.test_simulated import check_merge, check_norm

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
slow = pytest.mark.slow
PEFT = {"dropout": 0.1, "gain": True}
LORA_ONLY = PEFT | {"dropout_semantics": "lora_only"}


@pytest.fixture(autouse=True)
def simulated():
    with use_backend("triton", simulate=True), device(90) as sim, deterministic(False):
        yield sim


@pytest.fixture(autouse=True)
def form(monkeypatch):
    """What `assert_problem` and `assert_group` run: forward as the only element says, backward
    fused."""
    chosen = ["two launches"]

    def as_chosen(op):
        def call(*args):
            with forced_candidate(chosen[0]):
                return op(*args)

        return call

    monkeypatch.setattr(check, "lora_linear", as_chosen(lora_linear))
    monkeypatch.setattr(check, "lora_linear_group", as_chosen(lora_linear_group))
    with forced_candidate("fused"):
        yield chosen


def problem(rank=16, dtype=BF16, adapters=None, tokens=130, n_in=320, n_out=272, **flags):
    """Two tiles or more each way, and five steps of the loops over n_in and n_out, which are
    multiples of 16 as in most layers: else Triton copies otherwise."""
    return make_problem(tokens, n_in, n_out, rank, dtype, adapters, **flags)


@pytest.mark.parametrize(("rank", "adapters"), [
    (64, BF16), pytest.param(16, BF16, marks=slow), pytest.param(128, BF16, marks=slow), pytest.param(64, F32, marks=slow),
], ids=str)  # fmt: skip
def test_lora(simulated, rank, adapters):
    assert_problem(problem(rank, adapters=adapters))
    assert simulated.by_opcode["wgmma.mma_async"] > 0


@pytest.mark.parametrize(("flags", "adapters"), [
    ({"dropout": 0.1}, F32), (PEFT, BF16), (LORA_ONLY, BF16), pytest.param(PEFT, F32, marks=slow),
    pytest.param({"gain": True, "bias": True}, BF16, marks=slow), pytest.param(LORA_ONLY, F32, marks=slow),
], ids=str)  # fmt: skip
def test_dropout_and_dora(flags, adapters):
    assert_problem(problem(16, adapters=adapters, **flags))


@slow
@pytest.mark.parametrize("flags", [{}, {"dropout": 0.1}, {"gain": True}, PEFT], ids=str)
@pytest.mark.parametrize("adapters", [F16, F32], ids=str)
def test_float16(flags, adapters):
    assert_problem(problem(64, F16, adapters, **flags))


@pytest.mark.parametrize("flags", [{}, pytest.param({"dropout": 0.1}, marks=slow), pytest.param(PEFT, marks=slow)], ids=str)
def test_rows_that_no_map_can_be_made_of(flags):
    """Tiles come by cp.async then; and h in two parts."""
    p = problem(16, n_in=1030, **flags)
    assert_problem(dataclasses.replace(p, dy=as_layout(p.dy, "sliced_rows")))


@pytest.mark.parametrize("tokens", [17, 48, 64])
@pytest.mark.parametrize(("flags", "adapters"), [
    ({"dropout": 0.1}, BF16), pytest.param(LORA_ONLY, F32, marks=slow), pytest.param({}, F32, marks=slow),
], ids=str)  # fmt: skip
def test_one_pass(form, tokens, flags, adapters):
    form[0] = "one pass"
    assert_problem(problem(16, adapters=adapters, tokens=tokens, **flags))


@pytest.mark.parametrize("flags", [{"dropout": 0.1}, pytest.param({}, marks=slow), pytest.param(PEFT, marks=slow)], ids=str)
def test_groups(flags):
    members = [problem(rank, n_out=n, seed=n, **flags) for n, rank in ((260, 16), (130, 64), (70, 16))]
    assert_group([dataclasses.replace(p, x=members[0].x) for p in members])


@slow
@pytest.mark.parametrize("flags", [{}, {"dropout": 0.1}, {"gain": True}, PEFT], ids=str)
def test_many_rows(flags):
    assert_problem(problem(128, tokens=300, n_in=1030, **flags))


@pytest.mark.parametrize(("tokens", "dtype", "adapters"), [
    (64, BF16, F32), *(pytest.param(m, *types, marks=slow) for m in (16, 40, 64)
                       for types in ((BF16, BF16), (BF16, F32), (F16, F16), (F16, F32))),
], ids=str)  # fmt: skip
def test_dora_in_one_launch(tokens, dtype, adapters):
    p = problem(64, dtype, adapters, tokens=tokens)
    magnitude = torch.rand(272) + 0.5
    y, norm = dora_linear(p.x, p.w, p.a, p.b, magnitude, p.scale)
    adapted = p.w.double() + p.scale * p.b.double() @ p.a.double()
    wanted = adapted.square().sum(1).sqrt()
    assert ((norm - wanted).abs() <= 1e-4 * wanted).all()
    exact = p.x.double() @ adapted.T * (magnitude.double() / wanted)
    assert (y - exact).norm() <= 1.05 * (exact.to(dtype) - exact).norm() + 1e-4 * exact.norm()


@pytest.mark.parametrize("dtype", [BF16, pytest.param(F32, marks=slow), pytest.param(F16, marks=slow)], ids=str)
def test_weights(dtype):
    check_norm(130, 320, 128, dtype)
    check_merge(130, 320, 128, BF16, dtype)


@pytest.mark.parametrize(("tokens", "each", "dtype"), [
    (64, 1, BF16), (130, 1, BF16), *(pytest.param(64, *more, marks=slow) for more in ((2, BF16), (1, F16), (2, F16))),
    pytest.param(130, 2, BF16, marks=slow), pytest.param(130, 1, F16, marks=slow),
], ids=str)  # fmt: skip
def test_many_adapters(tokens, each, dtype):
    args = draw(tokens, 320, [260, 70], [64, 8, 40], each, dtype)
    assert_exact(multi_lora(*args[:3], planned(*args[2:5]), args[5]), args)
