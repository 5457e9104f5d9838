"""expert_lora_linear's Triton kernels in the interpreter: values, programs in any order, what they
read and launch, and planted bugs."""

import importlib.util
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_kernels import expert_lora_linear, use_backend
from lora_kernels.ops import missing_backends
from lora_kernels.testing import assert_expert_problem, make_expert_problem, run_experts
from lora_kernels.testing.interpreter_memory import InterpreterViolation
from tests.ops.interpreted import deterministic, interpreted
from tests.ops.quantised import dequantised, make_experts, over_codes
from tests.ops.quantised_plants import planted
from tests.ops.test_expert_lora_linear_index import assert_as_gathered

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops.expert_lora_linear import triton, triton_kernels
from lora_kernels.ops.triton_quantised import Quantised, dequantise_rows

BF16, F32 = torch.bfloat16, torch.float32
PRODUCT, OUTER = "expert_product_kernel", "expert_outer_kernel"


@pytest.mark.parametrize("dtype, adapter, transposed, flags", [
    (F32, F32, False, {"gain": True, "bias": True}),
    (BF16, BF16, False, {}),
    pytest.param(BF16, F32, True, {"gain": True}, marks=pytest.mark.slow),
    pytest.param(torch.float16, torch.float16, False, {"rank": 0, "bias": True}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("few", [triton.FEW, 0], ids=["one launch", "two launches"])
def test_values(dtype, adapter, transposed, flags, few, monkeypatch):
    monkeypatch.setattr(triton, "FEW", few)
    given = {"rank": 6, "left": 3, "transposed": transposed, "peft": True, "index": torch.int64} | flags
    with deterministic(False), interpreted(seed=3):
        assert_expert_problem(make_expert_problem([3, 0, 18, 1, 0], 40, 33, dtype=dtype, adapter_dtype=adapter, **given))


def test_one_token():
    """Triton takes the number 1 for a constant. The simulator's launches are compiled as a GPU's
    are."""
    with deterministic(False), use_backend("triton", simulate=True):
        assert_expert_problem(make_expert_problem([0, 1, 0], 40, 33, dtype=BF16))


def test_codes_become_numbers_in_a_launch_of_their_own():
    for name, transposed in (("nested", True), ("int8", False)):
        w = make_experts(name, 5, *((16, 32) if transposed else (32, 16)), torch.bfloat16)
        p = over_codes(w, [3, 0, 2, 1, 0], 16, 32, transposed, gain=True)
        with deterministic(False), interpreted() as names:
            assert_expert_problem(p)
        forward = ["dequantise_kernel", PRODUCT]
        assert names == [*forward, PRODUCT, *forward, OUTER, *forward, OUTER], names  # the gradient of gain asks for z again


@pytest.mark.parametrize(("old", "new"), [
    ("", ""),
    ("mask=inside & (expert > 0)", "mask=inside & (expert > 1)"),
    ("> tl.maximum(start, 0)", ">= tl.maximum(start, 0)"),
])  # fmt: skip
def test_codes_of_experts_without_tokens_stay_codes(old, new, monkeypatch, tmp_path):
    if old:
        planted(monkeypatch, tmp_path, old, new)
    w, sizes = make_experts("nested", 5, 12, 40, BF16), [3, 0, 2, 1, 0]
    for dtype in (torch.int32, torch.int64):
        with deterministic(False), interpreted():
            numbers = dequantise_rows(Quantised(*w.fields()), offsets=torch.tensor(sizes).cumsum(0).to(dtype)).view(w.shape)
        each = zip(numbers, dequantised(w), sizes, strict=True)
        assert all(of.equal(wanted) if size else of.isnan().all() for of, wanted, size in each) is (not old)


def test_no_tokens_and_no_experts_with_tokens():
    for sizes, left in (([0, 0], 0), ([0, 0], 3)):
        with deterministic(False), interpreted():
            assert_expert_problem(make_expert_problem(sizes, 16, 16, 2, left=left, bias=True))


def test_weights_of_experts_without_tokens_are_not_read():
    p = make_expert_problem([3, 0, 2], 16, 16, 2, bias=True)
    for t in (p.w, p.a, p.b, p.bias):
        t[1] = torch.nan
    with deterministic(False), interpreted():
        assert all(t.isfinite().all() for t in run_experts(p).values())


@pytest.mark.parametrize("offsets", [[-5, 2, 9], [2**31 - 1, -(2**31), 0]], ids=str)
def test_offsets_that_leave_the_tokens_read_nothing_else(offsets):
    """Nobody looks at those on a GPU before. Tiles of such experts may overlap, no more."""
    p = replace(make_expert_problem([2, 1, 1], 16, 16, 2), offsets=torch.tensor(offsets, dtype=torch.int32))
    with deterministic(False), interpreted(poison=False), torch.no_grad():
        try:
            expert_lora_linear(*p.arguments())
        except InterpreterViolation as violation:
            assert "a race" in str(violation)


@pytest.mark.parametrize(("old", "new"), [
    ("until <= tile", "until < tile"),
    pytest.param("tl.where(here, ends, 0)", "tl.where(here, ends + 1, 0)", marks=pytest.mark.slow),
    pytest.param("segments == tokens.experts, m,", "segments == tokens.experts, m - 1,", marks=pytest.mark.slow),
    ("layer.w + e * layer.w_step", "layer.w + e // 2 * layer.w_step"),
    ("layer.a + e * layer.a_step", "layer.a"),
    pytest.param("h *= layer.scale", "h *= layer.scale + 0.1", marks=pytest.mark.slow),
    pytest.param("bs = load_tile(layer.b + e * layer.b_step, ranks", "bs = load_tile(layer.b, ranks", marks=pytest.mark.slow),
    pytest.param("layer.gain + e * n + columns, mask=columns < n, other=0.0).to(tl.float32)\n        if layer.bias",
                 "layer.gain + columns, mask=columns < n, other=0.0).to(tl.float32)\n        if layer.bias",
                 marks=pytest.mark.slow),
    pytest.param("layer.bias + e * n", "layer.bias + (e + 1) % tokens.experts * n", marks=pytest.mark.slow),
    ("start = tl.load(tokens.offsets + e - 1, mask=e > 0", "start = tl.load(tokens.offsets + e - 1, mask=e > 1"),
    pytest.param("", "", marks=pytest.mark.slow),
])  # fmt: skip
def test_planted_bugs(old, new, monkeypatch, tmp_path):
    plant(old, new, monkeypatch, tmp_path)
    with pytest.raises((AssertionError, InterpreterViolation)) if old else nullcontext():
        # h in the launch of y, and in one of its own
        for few in (triton.FEW, 0):
            monkeypatch.setattr(triton, "FEW", few)
            with deterministic(False), interpreted():
                assert_expert_problem(make_expert_problem([3, 0, 18, 1], 20, 20, 2, left=2, gain=True, bias=True))


def test_a_tokens_bits_do_not_hang_on_the_others():
    """In the deterministic mode, in which few and many tokens take the same sums."""
    p = make_expert_problem([3, 0, 40, 1], 40, 33, 6, BF16, left=2, gain=True, bias=True)
    with deterministic(True), interpreted(), torch.no_grad():
        y = expert_lora_linear(*p.arguments())
        for token, expert in ((0, 0), (2, 0), (3, 2), (30, 2), (43, 3)):
            ends = (torch.arange(4) >= expert).int()
            alone = expert_lora_linear(p.x[token : token + 1], ends, *p.arguments()[2:])
            assert alone.equal(y[token : token + 1]), token


@pytest.mark.parametrize(("old", "new"), [
    ("", ""),
    ("of_x, x_rows = rows_of_tokens(tokens, rows, end)", "of_x, x_rows = rows, end"),
    ("of_u_rows, u_rows = rows_of_tokens(tokens, rows, end)", "of_u_rows, u_rows = rows, end"),
    ("mask=places < end, other=limit)", "mask=places < end - 1, other=limit)"),
])  # fmt: skip
def test_an_index(old, new, monkeypatch, tmp_path):
    plant(old, new, monkeypatch, tmp_path)
    for few in (triton.FEW, 0) if not old else (triton.FEW,):
        monkeypatch.setattr(triton, "FEW", few)
        with pytest.raises((AssertionError, InterpreterViolation)) if old else nullcontext():
            with deterministic(False), interpreted(seed=4):
                assert_as_gathered(make_expert_problem([3, 0, 18, 1], 20, 20, 2, BF16, left=2, gain=True))


def test_rows_that_there_are_not_are_not_read():
    p = make_expert_problem([2, 1, 1], 16, 16, 2)
    for row in (-1, 4, -(2**40), 2**40):
        index = torch.tensor([0, row, 3, 1])
        with deterministic(False), interpreted(), torch.no_grad():
            y = expert_lora_linear(*p.arguments(), index)
        assert y.isfinite().all() and not y[1].any()


def plant(old, new, monkeypatch, tmp_path):
    """The kernels from a changed copy of the file."""
    text = Path(triton_kernels.__file__).read_text()
    assert not old or text.count(old) == 1, old
    copy = tmp_path / "planted_experts.py"
    copy.write_text(text.replace(old, new) if old else text)
    spec = importlib.util.spec_from_file_location("planted_experts", copy)
    changed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, changed)
    spec.loader.exec_module(changed)
    for name in (PRODUCT, OUTER):
        monkeypatch.setattr(triton, name, getattr(changed, name))
