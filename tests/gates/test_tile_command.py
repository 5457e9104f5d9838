"""`python -m lora_kernels.testing.tile`: what it says of a row, and that it ends with 1 where
something is wrong."""

import re
from dataclasses import replace

import pytest

from lora_kernels.ops import missing_backends
from lora_kernels.testing import tile
from lora_kernels.testing.gates import Budget, sass

if "triton" in missing_backends() or sass.missing():
    pytest.skip(str(missing_backends().get("triton") or sass.missing()), allow_module_level=True)


def one(kernel):
    found = [each for each in tile._configurations(kernel) if "sm_90" in each.chips]
    assert found
    return found[0]


def run(monkeypatch, capsys, kernel, configuration, check=lambda: None, arch="90"):
    monkeypatch.setattr(tile, "_configurations", lambda name: [configuration])
    monkeypatch.setattr(tile, "simulation", lambda name: check)
    status = tile.main([kernel, "--arch", arch])
    return status, capsys.readouterr().out


def test_it_says_rows_gates_simulator_and_cost(monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, "forward", one("forward"))
    assert status == 0
    assert said.startswith("forward on sm_90 asks for dtype, m, k, n, layers") and '{"arch": "90-99"' in said
    # rows of another architecture
    assert '"100-109"' not in said.partition("gates")[0].replace('"0,100-109"', "")
    assert re.search(r"passes \((as in the table|compiled)\): forward, bf16, r=8: BM 128 BN 128 BK 64", said)
    assert "simulator\n    right, " in said
    assert "forward m 8192, k 4096, n 4096, r 16, bfloat16: forward " in said and "H100, predicted, not measured" in said


def test_a_broken_gate_ends_with_1(monkeypatch, capsys):
    known = one("norm")
    status, said = run(monkeypatch, capsys, "norm", replace(known, default=Budget(1.0), rows={}))
    assert status == 1 and "BROKEN (" in said and "1.0 allowed" in said


def test_a_wrong_result_ends_with_1(monkeypatch, capsys):
    def wrong():
        tile._within(tile.torch.ones(3), tile.torch.ones(3).double() * 1.1, 1e-3)

    status, said = run(monkeypatch, capsys, "norm", one("norm"), wrong)
    assert status == 1 and "WRONG: AssertionError: the relative error is 9.09e-02" in said


def test_a_chip_that_is_not_simulated_is_said(monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, "norm", one("norm"), arch="100")
    assert status == 0 and "not asked: the simulator runs sm_80, 86, 89, 90, 120" in said


def test_a_kernel_of_cuda(monkeypatch, capsys):
    status, said = run(monkeypatch, capsys, "weight_norm.cu", one("weight_norm.cu"))
    assert status == 0 and "128 threads, 30720 bytes of shared memory" in said and "Its tile is compiled in" in said


def test_the_simulator_is_asked(capsys):
    """The check of a small kernel, itself."""
    assert tile.simulated("norm", 90)[1] and tile.simulated("norm", 90)[0].startswith("right, 2 launches")


@pytest.mark.parametrize("kernel", sorted(tile.tiles.read()))
def test_every_kernel_has_a_check_and_those_that_are_shipped_have_gates(kernel):
    assert callable(tile.simulation(kernel))
    without = {"row_norm_squared", "add_up", "zero_gain", "quantised_zero_gain"}  # within others, or small
    assert bool(tile._configurations(kernel)) != (kernel in without)
