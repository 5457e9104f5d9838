"""Each gate fails on a kernel that has the fault."""

import dataclasses

import pytest
import torch

from lora_kernels.testing.gates import Budget, Configuration, Cuda, broken, measure
from tests.gates.configurations import GATES, HALF, KERNELS, LORA, SINGLE, corpus, lora

MATMUL = GATES[-1]
DOT = {"x": SINGLE, "w": SINGLE, "y": SINGLE, "m": 4096, "n": 4096, "k": 4096, "BM": 64, "BN": 64, "BK": 32}


def faults(kernel, arch, budget):
    """What the gates say of one kernel on one chip."""
    others = {chip: "not asked" for chip in kernel.chips if chip != arch}
    try:
        row = measure(Configuration("planted", kernel, budget, without=others), arch)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return broken(row, budget, arch), row


def edited(folder, name, old, new):
    """matmul.cu with one place of it, or of what it includes, changed."""
    for file in ("matmul.cu", "ptx.cuh"):
        text = (KERNELS / file).read_text()
        assert file != name or text.count(old) == 1
        (folder / file).write_text(text.replace(old, new) if file == name else text)
    return dataclasses.replace(MATMUL.kernel, source=folder / "matmul.cu")


def test_spills():
    found, row = faults(lora(128, 256, 64, warps=4), "sm_80", Budget(4, "HMMA"))
    assert row["stack"] > 0 and row["spills"] > 0
    assert found[0] == f"spills: {row['stack']} bytes of stack, {row['spills']} spilled"


@pytest.mark.parametrize(("arch", "size", "stages"), [("sm_86", 128, 4), ("gfx942", 64, 3)])
def test_too_much_shared_memory(arch, size, stages):
    matrix = "v_mfma" if arch == "gfx942" else "HMMA"
    found, row = faults(lora(128, 128, size, warps=8, stages=stages), arch, Budget(100, matrix))
    most = 65536 if arch == "gfx942" else 99 * 1024
    assert found[0] == f"shared memory: {row['shared']} bytes, {most} there are" and row["shared"] > most
    assert found[1] == "occupancy: 0 blocks of the 1 wanted, for shared memory"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_matrix_instruction(arch):
    """Products of float32 that are not rounded to TF32 are done one by one."""
    matrix = {"sm_80": "HMMA", "sm_90": "HGMMA"}[arch]
    found, _ = faults(corpus("dot", DOT | {"PRECISION": "ieee"}), arch, Budget(10**6, matrix))
    assert f"main loop: of load, where {matrix} was wanted" in found


def test_another_matrix_instruction():
    """A tile of 32 rows is too small for a warp group."""
    found, _ = faults(lora(32, 64, 32, warps=4), "sm_90", Budget(10**6, "HGMMA"))
    assert found == ["main loop: of HMMA, where HGMMA was wanted"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_120"])
def test_a_copy_loop_that_is_not_unrolled(tmp_path, arch):
    """nvcc does not unroll a loop whose beginning it does not know."""
    loop = "for (int part = 0; part < (PIECES + THREADS - 1) / THREADS; part++) {\n"
    loop += "    const int i = part * THREADS + threadIdx.x;"
    kernel = edited(tmp_path, "ptx.cuh", loop, "for (int i = threadIdx.x; i < PIECES; i += THREADS) {")
    found, row = faults(kernel, arch, MATMUL.budget(arch))
    assert row["spills"] == row["stack"] == 0
    assert "main loop: 2 loops in it touch memory, 0 allowed; not unrolled" in found
    assert any("instructions for each HMMA, 7.4 allowed" in text for text in found)


def test_a_matrix_loop_that_is_not_unrolled(tmp_path):
    loop = "for (int kk = 0;"
    kernel = edited(tmp_path, "matmul.cu", loop, f"_Pragma(\"unroll 1\") {loop}")
    found, _ = faults(kernel, "sm_80", MATMUL.budget("sm_80"))
    assert "main loop: 8 HMMA of the 16 wanted, so it is not unrolled" in found


@pytest.mark.parametrize("given", [{"w": torch.empty(9, dtype=HALF)[1:]}, {"k": 4095}], ids=["address", "row"])
def test_no_wide_loads_of_what_is_not_aligned(given):
    kernel = lora(64, 64, 32)
    found, row = faults(dataclasses.replace(kernel, args=kernel.args | given), "sm_80", Budget(10**6, "HMMA", wide=13))
    assert found == [f"16-byte loads: {row['wide']} of the 13 wanted"]


def test_too_few_blocks():
    found, _ = faults(MATMUL.kernel, "sm_80", dataclasses.replace(MATMUL.budget("sm_80"), blocks=8))
    assert found == ["occupancy: 7 blocks of the 8 wanted, for registers"]


def test_what_does_not_compile(tmp_path):
    (tmp_path / "wrong.cu").write_text("__global__ void wrong() { nonsense; }")
    found, _ = faults(Cuda(tmp_path / "wrong.cu", "wrong", 32), "sm_80", Budget(1))
    assert len(found) == 1 and found[0].startswith("does not compile: RuntimeError: nvcc: wrong.cu") and "nonsense" in found[0]
    found, _ = faults(corpus("lora", LORA | {"BM": 48, "BN": 64, "BK": 32}), "gfx942", Budget(1))
    assert len(found) == 1 and found[0].startswith("does not compile: CompilationError")
