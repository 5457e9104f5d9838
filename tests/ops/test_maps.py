"""Tiles that come through maps of tensors on sm_90 and later: the values and bits of pointers, and
where they are used."""

import dataclasses

import pytest
import torch

from lora_kernels import lora_linear, lora_linear_group, use_backend
from lora_kernels.ops import missing_backends
from lora_kernels.ptxsim import device
from lora_kernels.testing import as_layout, assert_group, assert_problem, make_group, make_problem, run
from lora_kernels.testing.check import member

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ops.launch import recorded
from lora_kernels.ops.lora_linear import triton as backend

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FLAGS = {
    "lora": {}, "dora_bias": {"gain": True, "bias": True}, "dropout": {"dropout": 0.3},
    "dora_lora_only": {"gain": True, "dropout": 0.3, "dropout_semantics": "lora_only"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def simulated():
    with use_backend("triton", simulate=True):
        yield


def step(p):
    leaves = list(p.require_grad().values())
    torch.autograd.grad(lora_linear(*p.arguments()), leaves, p.dy)


def mapped(call, *args):
    """Whether the forward, and whether the input's gradient, take maps of what they read."""
    with recorded() as launches:
        call(*args)
    args = {launch.kernel.fn.__name__: launch.args for launch in launches}
    forward, backward = args["forward_kernel"], args.get("input_gradient_kernel", {})
    for name in ("w0", "w1", "w2"):
        assert (forward[f"map_{name}"] is not None) <= (forward["map_x"] is not None)
    return forward["map_x"] is not None, backward.get("map_d0") is not None


def problem(m=130, dtype=BF16, n_in=136, n_out=72, **flags):
    return make_problem(m, n_in, n_out, 5, dtype, **flags)


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_by_architecture(arch):
    with device(arch), forced_candidate("two launches"):
        # boxes of 32 columns, which the gradient has on sm_120, save nothing there
        assert mapped(step, problem()) == (arch >= 90, 90 <= arch < 120)


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        ((True, True), {"n_in": 128, "n_out": 64}),
        ((False, False), {"m": 64}),
        ((False, False), {"dtype": F32}),
        ((False, False), {"n_in": 132}),  # rows that begin at no multiple of 16 bytes
        ((True, False), {"n_out": 68}),  # those of dy
        ((True, True), {"dtype": F16}),
        ((True, False), {"dtype": F16, "gain": True}),
        ((False, False), {"dropout": 0.3, "gain": True}),  # two products in one loop
        ((True, True), {"dropout": 0.3}),
        # dy ⊙ gain is in registers
        ((True, False), {"dropout": 0.3, "gain": True, "dropout_semantics": "lora_only"}),
    ],
    ids=str,
)
def test_by_problem(wanted, options):
    with device(90), forced_candidate("two launches"):
        assert mapped(step, problem(**options)) == wanted


@pytest.mark.parametrize("name", ["x", "w"])
def test_by_layout(name):
    p = problem()
    for layout in ("contiguous", "gapped_rows", "transposed", "offset", "every_other"):
        t = as_layout(getattr(p, name), layout)
        fits = t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0
        assert fits == (layout in ("contiguous", "gapped_rows"))
        with device(90), forced_candidate("two launches"), torch.no_grad():
            assert mapped(lora_linear, *dataclasses.replace(p, **{name: t}).arguments())[0] == fits
    with device(90), forced_candidate("two launches"), torch.no_grad():
        one_row = dataclasses.replace(p, x=p.x[:1].expand(130, -1))
        assert mapped(lora_linear, *one_row.arguments()) == (False, False)


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize("arch", [90, 100])
def test_by_group(arch, members):
    problems = make_group([{"n_out": 8 * (i + 3), "rank": 4} for i in range(members)], 130, 136, BF16)
    with device(arch), torch.no_grad():
        found, _ = mapped(lora_linear_group, problems[0].x, [member(p) for p in problems])
    assert found == (arch == 90 and members < 4)


@pytest.mark.parametrize(("arch", "dtype", "flags"), [
    *((90, BF16, flags) for flags in FLAGS), (90, F16, "dropout"), (90, F16, "dora_bias"), (120, BF16, "dropout"),
], ids=str)  # fmt: skip
def test_values(arch, dtype, flags):
    with device(arch), forced_candidate("two launches"):
        assert_problem(make_problem(150, 136, 264, 17, dtype, **FLAGS[flags]))


def test_not_in_one_pass():
    with device(90), forced_candidate("one pass"):
        assert mapped(step, problem()) == (False, True)


@pytest.mark.parametrize(("members", "dropout"), [(3, 0.0), (2, 0.3)])
def test_values_of_a_group(members, dropout):
    sizes = [{"n_out": n, "rank": r, "dropout": dropout} for n, r in ((136, 4), (24, 17), (72, 1))]
    with device(90), forced_candidate("two launches"):
        assert_group(make_group(sizes[:members], 130, 72, BF16))


def test_rows_with_gaps():
    p = make_problem(130, 136, 72, 5, BF16)
    x, w = (torch.nn.functional.pad(t, (0, 8))[:, :136] for t in (p.x, p.w))
    p = dataclasses.replace(p, x=x, w=w, dy=torch.nn.functional.pad(p.dy, (0, 16))[:, :72])
    with device(90), forced_candidate("two launches"):
        assert mapped(step, p) == (True, True)
        assert_problem(p)


def test_the_bits_of_pointers(monkeypatch):
    for flags in (FLAGS["dora_bias"], FLAGS["dropout"]):
        p = make_problem(130, 136, 72, 5, BF16, **flags)
        with device(90), forced_candidate("two launches"):
            by_maps = run(p)
            with monkeypatch.context() as patch:
                patch.setattr(backend, "loads_by_tma", lambda *_: False)
                assert mapped(step, p) == (False, False)
                by_pointers = run(p)
        assert all(by_maps[name].equal(by_pointers[name]) for name in by_maps)
