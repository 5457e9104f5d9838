"""The table of the CPU's ways, and every way it can name, whatever this processor would choose."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn import functional as F

_cpu = pytest.importorskip("lora_kernels._cpu", reason="the CPU kernels are not built here")

from lora_kernels import use_backend  # noqa: E402
from lora_kernels.ops.cpu_gemm import back_product, base_product, choice, forced_choice  # noqa: E402
from lora_kernels.ops.dropout import mask  # noqa: E402
from lora_kernels.ops.lora_linear import cpu as module  # noqa: E402
from lora_kernels.ops.tables import cpu as table  # noqa: E402
from lora_kernels.testing import assert_problem, exact, make_problem, rms, run  # noqa: E402
from tests.ops.cpu import at_level, operands  # noqa: E402
from tests.ops.interpreted import deterministic  # noqa: E402

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FLAGS = {
    "lora": {}, "bias": {"bias": True}, "dropout": {"dropout": 0.3}, "dora": {"gain": True},
    "dora_bias": {"gain": True, "bias": True}, "dropped_base": {"gain": True, "dropout": 0.3},
    "lora_only": {"gain": True, "bias": True, "dropout": 0.3, "dropout_semantics": "lora_only"},
}  # fmt: skip
ALL = NEVER = table.ALL
PLAIN = {"small": 0, "packed_from": 1, "packed": 0, "addmm_from": NEVER, "streamed_from": 1, "streamed": 0, "thin": 0}
PLAIN |= {"addmm_back_from": NEVER, "small_back": 0}
ADDMM = {"addmm_from": 0, "addmm_back_from": 0}


@pytest.fixture(params=_cpu.levels())
def level(request):
    with at_level(request.param), use_backend("cpu"):
        yield request.param


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 0)


def by(dtype, **numbers):
    """The row in use, with nothing but what `numbers` say."""
    return forced_choice(replace(choice(dtype), **{**PLAIN, **numbers}))


def test_the_table():
    rows = table.read()
    keys = [(row.level, row.dtype, row.processor) for row in rows]
    assert len(keys) == len(set(keys))
    for row in rows:
        assert row.measured and row.small >= 0 and row.packed_from > 0 < row.streamed_from, row
        if row.dtype == "float32":
            assert row.addmm_from == row.addmm_back_from == NEVER
        else:
            assert row.thin == 0, "in 16 bits what the library's thin passes give would be rounded"
    levels = (*_cpu.levels(), "portable", "avx2", "avx512", "amx")
    for level, dtype in product(levels, ("float32", "bfloat16", "float16")):
        assert table.row_for(level, dtype, "nobody's").processor == ""


def test_a_row_of_the_processor_comes_first_and_a_new_level_has_the_nearest():
    one = table.row_for("avx512", "float32", "")
    own, other = replace(one, processor="AMD 26", small=7), replace(one, processor="AMD 25", small=9)
    rows = (one, own, other)
    found = [table.row_for("avx512", "float32", on, rows=rows).small for on in ("AMD 26", "AMD 25", "Intel 6")]
    assert found == [7, 9, one.small]
    assert table.row_for("avx99", "float32", "AMD 26", rows=rows) == own
    library = replace(one, level="avx512 native", addmm_from=1)
    for native, wanted in ((True, library), (False, one)):
        assert table.row_for("avx512", "float32", "", native, (*rows, library)) == wanted
    assert table.row_for("avx512", "float32", "", True, rows) == one
    with pytest.raises(LookupError, match="avx2 and bfloat16"):
        table.row_for("avx2", "bfloat16", "", rows=rows)


def test_the_file_is_read_as_it_is_written(tmp_path):
    table.write(table.read(), tmp_path / "cpu.json")
    assert (tmp_path / "cpu.json").read_text() == table.FILE.read_text()


def test_a_forced_row_ends_with_its_block(level):
    before = choice(F32)
    with by(F32, small=3):
        assert choice(F32).small == 3 and choice(BF16) is choice(BF16)
    assert choice(F32) == before


# the Python around the kernels is the same on each level
@pytest.mark.parametrize(("name", "flags"), [
    *((_cpu.levels()[-1], flags) for flags in FLAGS), *product(_cpu.levels()[:-1], ("dropout", "dora_bias")),
])  # fmt: skip
@pytest.mark.parametrize(("dtype", "numbers"), [
    *((dtype, {"small": ALL, "small_back": ALL}) for dtype in (F32, BF16, F16)),
    (F32, {"packed": ALL, "streamed": ALL}), (F32, {}), (F32, {"thin": ALL}),
    (BF16, {"packed": ALL, "streamed": ALL}), (BF16, {}),
    (BF16, ADDMM), (F16, {"packed": ALL, "streamed": ALL}),
    (F16, ADDMM),
], ids=str)  # fmt: skip
def test_every_way(name, dtype, numbers, flags):
    # thin passes by the library are not for the mode that fills memory with NaN
    with at_level(name), use_backend("cpu"), by(dtype, **numbers), deterministic("thin" not in numbers):
        assert_problem(made_small(make_problem(70, 129, 97, 8, dtype, **FLAGS[flags])))
        across = make_problem(5, 33, 65, 3, dtype, **FLAGS[flags])
        across.w = across.w.T.contiguous().T  # as GPT-2's
        assert_problem(made_small(across))


def made_small(problem):
    """The adapter a tenth of the base, as training leaves it: what is rounded before the library
    adds to it counts by its size."""
    return replace(problem, b=0.15 * problem.b)


def test_the_ways_are_those(level, monkeypatch):
    """That a forced row runs what it names: the library's GEMM in the dtype of x or in float32, or
    none."""

    def products(dtype, mode=False, **numbers):
        seen = []
        real = torch.Tensor.addmm_, torch.mm
        monkeypatch.setattr(torch.Tensor, "addmm_", lambda y, *a, **k: (seen.append(y.dtype), real[0](y, *a, **k))[1])
        monkeypatch.setattr(torch, "mm", lambda a, b, **k: (seen.append(a.dtype), real[1](a, b, **k))[1])
        with by(dtype, **numbers), deterministic(mode):
            run(make_problem(40, 64, 48, 4, dtype))
        monkeypatch.setattr(torch.Tensor, "addmm_", real[0])
        monkeypatch.setattr(torch, "mm", real[1])
        return seen

    tiles = _cpu.has_tiles()
    assert products(F32, packed=64, streamed=64) == []
    assert products(F32, small=64, small_back=64) == products(BF16, small=64, small_back=64) == []
    assert products(F32) == [F32]  # dx by the operator @
    assert set(products(F32, thin=64)) == {F32} and len(products(F32, thin=64)) == 7
    assert products(F32, mode=True, thin=64) == [F32], "the library's bits follow the threads"
    assert products(BF16, packed=64, streamed=64) == []
    assert products(BF16, **ADDMM) == ([] if tiles else [BF16, BF16])
    assert products(BF16) == ([] if tiles else [F32, F32])


@pytest.mark.parametrize("flags", ["lora", "bias", "dropout"])
def test_addmm_is_no_worse_than_peft(flags):
    """y and dx, which this form makes; 2 % are chance."""
    p = made_small(make_problem(128, 128, 160, 16, BF16, **FLAGS[flags]))
    with at_level("portable"), by(BF16, **ADDMM):
        ours = errors(run(p), p)
    theirs = errors(peft(p), p)
    assert all(ours[name] <= 1.02 * theirs[name] for name in "yx"), (ours, theirs)


def test_an_adapter_that_dominates_is_rounded_twice_at_most():
    p = make_problem(128, 128, 160, 16, BF16)
    p.b = p.b * 40
    with at_level("portable"), by(BF16, **ADDMM):
        found, truth = errors(run(p), p), exact(p).values
    for name in "yx":
        ideal = rms(truth[name].to(BF16).double() - truth[name])
        assert 1.2 * ideal < found[name] <= 1.5 * ideal, "a single rounding would be another form"


def errors(results, problem):
    truth = exact(problem).values
    return {name: rms(results[name].double() - truth[name]) for name in "yx"}


def peft(problem):
    """PEFT's formula in plain PyTorch, each step in the dtype that PEFT has."""
    p = copy.copy(problem)
    leaves = p.require_grad()
    dropped = p.x if not p.dropout else p.x * mask(p.seed, p.dropout, *p.x.shape, p.x.dtype, p.x.device)
    term = p.scale * F.linear(F.linear(dropped, p.a), p.b)
    y = F.linear(p.x, p.w, p.bias) + term
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rows_of_several_tenants_never_meet_the_library_in_16_bits(level, dtype):
    """With AMX a NaN in one row can reach others there. multi_lora's product is float32, whatever
    the table says of a layer's."""
    x, w = operands(40, 129, 97, dtype)
    x[7, 5] = torch.nan
    with by(dtype, **ADDMM):
        y = base_product(x, w)
        dx = back_product(x, w.T.contiguous())
    wanted = x.double() @ w.double().T
    allowed = (x.double().nan_to_num().abs() @ w.double().abs().T) * 130 * 2.0**-24
    for found in (y, dx):
        assert found.dtype is F32 and found.isnan().sum() == 97 and found[7].isnan().all()
        assert ((found.double() - wanted).abs() <= allowed)[torch.arange(40) != 7].all()
