"""What the walk finds in SASS: each way in which a register of A, of the sums, or shared memory is
touched too early."""

import re
import subprocess

import pytest
import torch

from lora_kernels.testing.gates import sass
from lora_kernels.testing.gates.hazards import _written, hazards
from lora_kernels.testing.gates.measure import unsound
from tests.gates.test_gates_parts import code

RS = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4], R24"
SS = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def found(*lines):
    """A loop's lines are indented by hand: labels end with a colon and begin with a dot."""
    return hazards(code("\n".join(lines)))


def test_a_register_of_a():
    early = ["LDS.64 writes R88, of A, before the wait"]
    assert found(f"{RS}, gsb0", WAIT, "LDS.64 R88, [R2]", "EXIT") == []
    assert found(f"{RS}, gsb0", "LDS.64 R88, [R2]", WAIT, "EXIT") == early
    assert found(f"{RS}, gsb0", "@P0 LDS.64 R88, [R2]", WAIT, "EXIT") == early
    # in no group that could be waited for
    assert found(RS, WAIT, "LDS.64 R88, [R2]", "EXIT") == early
    assert found(f"{RS}, gsb0", f"@P0 {WAIT}", "LDS.64 R88, [R2]", "EXIT") == early
    assert found(f"{RS}, gsb0", "STS [R88], R89", "FADD R2, R88, R91", "ISETP.GE.AND P0, PT, R90, RZ, PT", WAIT, "EXIT") == []


def test_the_last_groups_may_be_left():
    other = "HGMMA.64x64x16.F32.BF16 R24, R92, gdesc[UR4], R24, gsb0"
    lines = [f"{RS}, gsb0", other, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R88, R2", "MOV R92, R2", WAIT, "MOV R92, R3", "EXIT"]
    assert found(*lines) == ["MOV writes R92, of A, before the wait"]
    again = [f"{RS}, gsb0", other, f"{RS}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R92, R2", "MOV R88, R2", "EXIT"]
    assert found(*again) == ["MOV writes R88, of A, before the wait"]


def test_the_next_round_of_a_loop():
    """The wait for a round stands in the next one, after the registers are written: as ptxas 12.9
    does it."""
    loop = [".L_loop:", "{}", "{}", RS + ", gsb0", "@P0 BRA `(.L_loop)", WAIT, "EXIT"]
    text = "\n".join(loop)
    assert hazards(code(text.format(WAIT, "SHF.R.U32.HI R91, RZ, 0x10, R2"))) == []
    early = ["SHF.R.U32.HI writes R91, of A, before the wait"]
    assert hazards(code(text.format("SHF.R.U32.HI R91, RZ, 0x10, R2", WAIT))) == early


def test_of_two_ways_one_does_not_wait():
    lines = [f"{RS}, gsb0", "@P0 BRA `(.L_on)", "{}", ".L_on:", "MOV R90, R2", WAIT, "EXIT"]
    text = "\n".join(lines)
    assert hazards(code(text.format(WAIT))) == ["MOV writes R90, of A, before the wait"]
    assert hazards(code(text.replace("@P0 BRA", "BRA").format(WAIT))) == ["MOV writes R90, of A, before the wait"]
    assert hazards(code(text.replace("`(.L_on)", "`(.L_end)").replace("EXIT", "EXIT\n.L_end:\nEXIT").format(WAIT))) == []


def test_what_is_called_and_what_comes_after():
    lines = [f"{RS}, gsb0", "CALL.REL.NOINC `($divide)", "{}", WAIT, "EXIT", "$divide:", "{}", "RET.REL.NODEC R4 `(k)"]
    text = "\n".join(lines).replace("$divide:", ".divide:").replace("$divide", ".divide")
    assert hazards(code(text.format("NOP", "NOP"))) == []
    assert hazards(code(text.format("NOP", "MOV R88, R2"))) == ["MOV writes R88, of A, before the wait"]
    assert hazards(code(text.format("MOV R88, R2", "NOP"))) == ["MOV writes R88, of A, before the wait"]
    assert hazards(code(text.format("MOV R88, R2", WAIT))) == ["MOV writes R88, of A, before the wait"]


def test_sums():
    used = "uses R55, of the sums, before the wait"
    assert found(f"{SS}, gsb0", f"{SS}, gsb0", WAIT, "FADD R2, R55, R3", "EXIT") == []
    assert found(f"{SS}, gsb0", "FADD R2, R3, -R55", WAIT, "EXIT") == [f"FADD {used}"]
    assert found(f"{SS}, gsb0", "FADD R55, R3, R2", WAIT, "EXIT") == [f"FADD {used}"]
    assert found(f"{SS}, gsb0", "STG.E desc[UR4][R2.64], R55", WAIT, "EXIT") == [f"STG.E {used}"]
    assert found(f"{SS}, gsb0", "LDS R2, [R55+0x10]", WAIT, "EXIT") == [f"LDS {used}"]
    assert found(f"{SS}, gsb0", "FADD R2, R56, UR55", "UMOV UR24, UR25", WAIT, "EXIT") == []
    other = "HGMMA.64x64x16.F32.BF16 R88, R52, gdesc[UR4], R88, gsb0"
    assert found(f"{SS}, gsb0", other, WAIT, "EXIT") == ["HGMMA.64x64x16.F32.BF16 uses R52, of the sums, before the wait"]
    assert found("HGMMA.64x64x16.F16 R24, gdesc[UR4], R24, gsb0", "MOV R40, R2", WAIT, "EXIT") == []


@pytest.mark.parametrize(("instruction", "registers"), [
    ("LDS.64 R88, [R2]", 2), ("LDG.E.128 R88, desc[UR4][R2.64]", 4), ("LDG.E.U16 R88, desc[UR4][R2.64]", 1),
    ("LDSM.16.M88.4 R88, [R2]", 4), ("LDSM.16.MT88.2 R88, [R2]", 2), ("LDSM.16.M88 R88, [R2]", 1), ("CS2R R88, SRZ", 2),
    ("CS2R.32 R88, SRZ", 1), ("IMAD.WIDE.U32 R88, R2, 0x4, R4", 2), ("IMAD.X R88, R2, R3, RZ, P6", 1),
    ("HMMA.16816.F32.BF16 R88, R2, R3, R4", 4), ("HMMA.16816.F16 R88, R2, R3, R4", 2), ("SHFL.BFLY PT, R88, R6, 0x1, 0x1f", 1),
    ("ATOMG.E.ADD.STRONG.GPU PT, R88, desc[UR28][R36.64], R9", 1), ("LOP3.LUT P0, R88, R2, R3, RZ, 0xc0, !PT", 1),
    ("IADD3 R88, P6, R10, 0x30, RZ", 1), ("F2F.F64.F32 R88, R2", 2), ("F2I.U64.TRUNC R88, R6", 2), ("DFMA R88, R2, R4, R6", 2),
    ("I2F.U64.RP R88, R10", 1), ("SHF.R.U64 R88, R34, 0xa, R5", 1), ("R2UR UR4, R88", 0), ("UMOV UR88, 0x4", 0),
    ("STS.128 [R2], R88", 0), ("LDGSTS.E.128 [R88], desc[UR4][R2.64]", 0), ("ISETP.GE.AND P0, PT, R88, RZ, PT", 0),
    ("BAR.SYNC R88, R89", 0), ("WARPSYNC R88", 0), ("R2P PR, R88, 0x7f", 0), ("FCHK P6, R88, R8", 0), ("NOP", 0), ("EXIT", 0),
    ("RET.REL.NODEC R88 `(k)", 0), ("SYNCS.ARRIVE.TRANS64 RZ, [UR8], R88", 0), ("MUFU.RCP R88.reuse, R2", 1),
])  # fmt: skip
def test_what_an_instruction_writes(instruction, registers):
    (one,) = code(instruction).instructions
    assert list(_written(one)) == list(range(88, 88 + registers))


@pytest.mark.parametrize("product", [SS + ", gsb0", "UTCHMMA gdesc[UR14], gdesc[UR16], tmem[UR8], idesc[UR19], UP0"])
def test_copies_that_are_not_shown_to_the_asynchronous_proxy(product):
    copy, wait, fence = "LDGSTS.E.BYPASS.128 [R106], desc[UR20][R16.64]", "DEPBAR.LE SB0, 0x1", "FENCE.VIEW.ASYNC.S"
    says = [f"{product.split()[0]} reads what was copied to shared memory, without a fence of the asynchronous proxy"]
    assert found(copy, wait, fence, product, "EXIT") == []
    assert found(copy, wait, product, "EXIT") == says
    assert found(copy, fence, wait, product, "EXIT") == says
    assert found(copy, wait, f"@P0 {fence}", product, "EXIT") == says
    assert found(wait, product, copy, "EXIT") == []
    loop = [copy, "LDGDEPBAR", ".L_loop:", wait, "{}", product, copy, "LDGDEPBAR", "@P0 BRA `(.L_loop)", "EXIT"]
    assert hazards(code("\n".join(loop).format(fence))) == []
    assert hazards(code("\n".join(loop).format("NOP"))) == says


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="gsb1 is not known"):
        found(f"{SS}, gsb1", "EXIT")
    for wait in ("WARPGROUP.DEPBAR.LE gsb1, 0x0", "WARPGROUP.DEPBAR gsb0, 0x0"):
        with pytest.raises(ValueError, match="this wait is not known"):
            found(f"{SS}, gsb0", wait, "EXIT")
    with pytest.raises(ValueError, match="its sums are not in registers"):
        found("HGMMA.64x64x16.F32 UR4, gdesc[UR4], R24", "EXIT")
    with pytest.raises(ValueError, match="no label .L_gone"):
        found(f"{SS}, gsb0", "@P0 BRA `(.L_gone)", "EXIT")
    # of code without such products nothing is asked
    assert hazards(code("@P0 BRA `(.L_gone)\nEXIT")) == []


def compiled_ptx(kernel, arch, **args):
    """The PTX of a kernel of the simulator's corpus in bf16, 128 columns, and its name."""
    pytest.importorskip("triton", reason="triton is not installed here (requirements-dev.txt has it for Linux on x86-64)")
    from lora_kernels.ptxsim.triton_ptx import compile_triton
    from tests.ptxsim import triton_kernels

    sizes = {"m": 256, "n": 256, "k": 1024, "BM": 64, "BN": 128, "BK": 64}
    given = {name: torch.empty(0, dtype=dtype) if isinstance(dtype, torch.dtype) else dtype for name, dtype in args.items()}
    return compile_triton(getattr(triton_kernels, kernel), sizes | given, arch).ptx, kernel


def assembled(folder, ptx, kernel, arch, tool="ptxas"):
    """What is found in it as one of the assemblers of Triton's wheel makes it."""
    (folder / "k.ptx").write_text(ptx)
    command = [str(sass.find_tool(tool)), f"--gpu-name=sm_{arch}a", str(folder / "k.ptx"), "-o", str(folder / "k.cubin")]
    subprocess.run(command, check=True, capture_output=True)
    return hazards(sass.read_cubin((folder / "k.cubin").read_bytes(), kernel, arch))


def version(tool):
    said = subprocess.run([str(sass.find_tool(tool)), "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"release (\d+)\.(\d+)", said).groups()))


CAST = {"x": torch.float32, "w": torch.bfloat16, "y": torch.float32}


def test_registers_of_a_in_a_pipelined_loop(tmp_path):
    """The PTX is right, and ptxas 12.9 takes the registers of A too early; 13.3 does not, nor 12.9
    in a loop of one stage."""
    pipelined = compiled_ptx("cast_dot", 90, **CAST, STAGES=3)
    assert version("ptxas") < (13, 3) <= version("ptxas-blackwell")
    found = assembled(tmp_path, *pipelined, 90)
    assert found and all(text.endswith("of A, before the wait") for text in found)
    assert assembled(tmp_path, *pipelined, 90, "ptxas-blackwell") == []
    assert assembled(tmp_path, *compiled_ptx("cast_dot", 90, **CAST, STAGES=1), 90) == []


@pytest.mark.parametrize(("arch", "product"), [(90, "HGMMA"), (100, "UTCHMMA")])
def test_a_fence_that_is_gone(tmp_path, arch, product):
    args = dict.fromkeys("xwaby", torch.bfloat16) | {"r": 16, "scale": 0.5, "R": 16}
    tool = "ptxas" if arch == 90 else "ptxas-blackwell"
    ptx, kernel = compiled_ptx("lora", arch, **args)
    assert assembled(tmp_path, ptx, kernel, arch, tool) == []
    without = re.sub(r"fence\.proxy\.async\S*;", "", ptx)
    assert without != ptx
    found = assembled(tmp_path, without, kernel, arch, tool)
    assert found and all(text.startswith(product) and "without a fence" in text for text in found)


def test_the_gate():
    row = {"hazards": 2, "hazard": "MOV writes R88, of A, before the wait"}
    assert unsound(row) == ["hazards: 2 instructions, the first: MOV writes R88, of A, before the wait"]
    assert unsound({"fingerprint": ""}) == [] and unsound({"stack": 8}) == ["spills: 8 bytes of stack, 0 spilled"]
    assert unsound({"error": "X: y"}) == ["does not compile: X: y"]
    assert unsound({"stack": 8, "spills": 2}, 2) == [] != unsound({"stack": 8, "spills": 3}, 2)
