"""The candidate "specialised": taken where it was measured, or by force, and never by prediction;
what it refuses."""

import pytest
import torch

from lora_kernels.ops import tables
from lora_kernels.ops.cost import Problem
from lora_kernels.ops.dispatch import choose_plan, forced_candidate, tables_from
from tests.ops.test_dispatch import BF16, F32, MIB, backward, choice, forward, found, measured

SPECIALISED = {"backends": ("triton", "cuda")}


def test_specialised_is_taken_where_it_was_measured_and_nowhere_else(tmp_path):
    """However good a prediction is, and also where tables know others."""
    for p in (forward(), backward(), forward(gain=True, dropout=True), backward(dtype=torch.float16)):
        assert found(p, **SPECIALISED)["specialised"].refused is None
        assert choose_plan(p, 90, **SPECIALISED).winner == "addmm"
        assert choose_plan(p, 90, True, **SPECIALISED).winner not in ("addmm", "specialised")
    pairs, h = 8192 * 64 * 2 / MIB, 8192 * 16 * 4 / MIB
    b = a = 16 * 4096 * 2 / MIB
    assert found(forward(), **SPECIALISED)["specialised"].bytes / MIB == 64 + a + 2 * h + 2 * pairs + 64 + 32 + b + 64
    quick = tables.table_for(90)._replace(
        gpu="a GPU", measured=True, stamp={}, choices=(choice(forward(), "addmm", addmm=1e-4),),
        efficiency={kind: {size: dict(shares, specialised=1.0) for size, shares in sizes.items()}
                    for kind, sizes in tables.table_for(90).efficiency.items()},
    )  # fmt: skip
    tables.write_table(quick, tmp_path)
    with tables_from(tmp_path):
        far = choose_plan(forward(20000, 1024), 90, **SPECIALISED)
        assert far.why == "least predicted time" and far.winner != "specialised"
    row = choice(forward(), "specialised", specialised=1e-4, addmm=2e-4, **{"two launches": 3e-4})
    with measured(tmp_path, row):
        assert (
            choose_plan(forward(), 90, **SPECIALISED).winner
            == choose_plan(forward(), 90, backends=("cuda",)).winner
            == "specialised"
        )
        assert choose_plan(forward(), 90).winner == "addmm"  # Triton's backend alone was asked
        refused = (("specialised", "the rows of x do not begin at multiples of 16 bytes"),)
        made = choose_plan(forward(), 90, refused=refused, **SPECIALISED)
        assert made.winner == "addmm" and "refuses: the rows of x do not begin" in str(made)
        with (
            forced_candidate("specialised"),
            pytest.raises(NotImplementedError, match="cannot run as specialised: the rows of x do not"),
        ):
            choose_plan(forward(), 90, refused=refused, **SPECIALISED)


@pytest.mark.parametrize(("problem", "arch", "reason"), [
    (forward(), 80, "sm_80: its code is for sm_90a"), (forward(), 100, "sm_100: its code"), (backward(), 120, "sm_120: its"),
    (forward(64), 90, "m is 64: it takes more than 64"), (forward(65), 90, None), (forward(r=512), 90, None),
    (forward(dtype=F32), 90, "float32: it takes 16 bits"), (forward(k=4092), 90, "k is 4092 and n"),
    (forward(gain=True, dropout=True, drop_base=True), 90, "the base is dropped, too"),
    (backward(n=4092), 90, "k is 4096 and n 4092"), (Problem("forward", 99, 64, (64, 64), (8, 8), BF16), 90, "2 layers share"),
])  # fmt: skip
def test_what_specialised_refuses(problem, arch, reason):
    refused = found(problem, arch, **SPECIALISED)["specialised"].refused
    assert refused is None if reason is None else refused.startswith(reason)
