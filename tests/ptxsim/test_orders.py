"""The package's own kernels with one order between programs or launches taken away: each is found,
whatever the values."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels import lora_linear, multi_lora, use_backend
from lora_kernels.ops import BatchPlan, missing_backends
from lora_kernels.ptxsim import SimulationError, device
from lora_kernels.testing import make_problem

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

from lora_kernels.ops import cost
from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ops.lora_linear import triton_forward
from lora_kernels.ops.multi_lora import triton_small
from tests.ops.multi import ids_of
from tests.ops.test_multi_lora import draw

LORA, MULTI = (sys.modules[f"lora_kernels.ops.{op}.triton"] for op in ("lora_linear", "multi_lora"))


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Puts kernels from a changed copy of their file in the place of their own, with tickets that
    they alone count."""

    def planted(module, backend, names, old, new):
        text = Path(module.__file__).read_text()
        assert not old or text.count(old) == 1, old
        copy = tmp_path / "planted.py"
        copy.write_text(text.replace(old, new) if old else text)
        spec = importlib.util.spec_from_file_location("planted", copy)
        changed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(changed)
        for name in names:
            monkeypatch.setattr(backend, name, getattr(changed, name))
        monkeypatch.setattr("lora_kernels.ops.launch._tickets", {})

    return planted


def found(run, arch, seeds):
    """What is found first in each order of the blocks."""
    said = []
    for seed in seeds:
        torch.manual_seed(0)
        with use_backend("triton", simulate=True), device(arch, seed=seed):
            try:
                run()
            except SimulationError as error:
                said.append(str(error).splitlines()[1])
    return said


TICKET = 'tl.atomic_add(ticket + tile, 1, sem="acq_rel")'


@pytest.mark.parametrize("order", ["acq_rel", "relaxed", "acquire", "release"])
def test_the_ticket_of_forward(order, plant, monkeypatch):
    plant(triton_forward, LORA, ["forward_kernel"], TICKET, TICKET.replace("acq_rel", order))
    monkeypatch.setattr(cost, "split_k_count", lambda *_: 3)

    def run():
        with forced_candidate("one pass"):
            lora_linear(*make_problem(9, 320, 70, 8, torch.bfloat16).arguments())

    said = found(run, 80, (0,))
    assert len(said) == (order != "acq_rel") and all("ld: race on forward_kernel_param_" in text for text in said)


@pytest.mark.parametrize("waits", [True, False])
def test_the_wait_of_forward_for_shrink(waits, plant):
    plant(triton_forward, LORA, ["forward_kernel"], "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_wait()" if waits else "pass")

    def run():
        with forced_candidate("two launches"):
            lora_linear(*make_problem(70, 96, 80, 8, torch.bfloat16).arguments())

    said = found(run, 90, (0,))
    assert len(said) == (not waits) and all("reads shrink_kernel_param_5+" in text for text in said)


@pytest.mark.parametrize("ticket", [
    "", "tl.atomic_add(ticket + g, 1", pytest.param("OF_H, mask=mask", marks=pytest.mark.slow),
    pytest.param("tl.atomic_add(ticket + SLICES + tile, 1", marks=pytest.mark.slow),
    pytest.param("OF_W", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_tickets_of_multi_lora_in_one_launch(ticket, plant):
    old, new = (f'{ticket}, sem="{order}")' if ticket else "" for order in ("acq_rel", "relaxed"))
    plant(triton_small, MULTI, ["multi_small_kernel"], old, new)

    def run():
        x, w, slots, slot, weights, bias = draw(5, 600, [40, 9], [8, 24, 3], 1, torch.bfloat16)
        multi_lora(x, w, slots, BatchPlan.build(ids_of(slot, slots), 3, weights), bias)

    said = found(run, 80, (0, 1))
    assert bool(said) == bool(ticket) and all("ld: race on multi_small_kernel_param_" in text for text in said)
