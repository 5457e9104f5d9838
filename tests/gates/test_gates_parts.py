"""How the gates read code, count occupancy, keep the table, and say what is missing."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lora_kernels.ptxsim import nvcc
from lora_kernels.testing.gates import (
    Budget,
    Change,
    Configuration,
    Cuda,
    Table,
    Triton,
    measure,
    occupancy,
    sass,
    table,
    versions,
)
from lora_kernels.testing.gates.amdgcn import read_amdgcn
from lora_kernels.testing.gates.code import LOAD, WIDE, Code, Instruction, MainLoop, count_opcodes, main_loop
from tests.gates.configurations import ALL, CORPUS, GATES, HALF, SINGLE, corpus

HERE = Path(__file__).parent
MATMUL = GATES[-1]
CAST = {"x": SINGLE, "w": HALF, "y": SINGLE, "m": 256, "n": 256, "k": 1024, "BM": 64, "BN": 128, "BK": 64}


def code(text, kernel="k"):
    """SASS without addresses."""
    lines = [line if line.startswith(".") else f"/*0000*/ {line} ;" for line in text.split("\n")]
    instructions, labels = sass._parse_disassembly("\n".join([f".text.{kernel}:", *lines]), kernel)
    return Code(0, 0, 0, 0, tuple(instructions), labels)


def test_the_loop_with_the_most_matrix_instructions():
    loop = main_loop(code(textwrap.dedent("""\
        .L_few:
        HMMA.16816.F32 R0, R0, R0, R0
        @P0 BRA `(.L_few)
        .L_outer:
        LDG.E.128 R0, [R2]
        .L_copy:
        LDGSTS.E.64 [R0], [R2]
        @!P1 BRA `(.L_copy)
        HMMA.16816.F32 R0, R0, R0, R0
        HMMA.16816.F32 R0, R0, R0, R0
        BRA.U !UP0, `(.L_outer)
        EXIT
        .L_trap:
        BRA `(.L_trap)""")))
    assert loop == MainLoop("HMMA", 2, 6, copies=1)


def test_the_inner_of_two_loops():
    """As in a persistent kernel, whose tiles end with the adapter's product."""
    loop = main_loop(code(textwrap.dedent("""\
        .L_tile:
        NOP
        .L_depth:
        HMMA.16816.F32 R0, R0, R0, R0
        @P0 BRA `(.L_depth)
        HMMA.16816.F32 R0, R0, R0, R0
        @P1 BRA `(.L_tile)
        EXIT""")))
    assert loop == MainLoop("HMMA", 1, 2, copies=0)


def test_a_jump_back_from_behind_the_end_is_no_loop():
    loop = main_loop(code(textwrap.dedent("""\
        HMMA.16816.F32 R0, R0, R0, R0
        HMMA.16816.F32 R0, R0, R0, R0
        @P1 BRA `(.L_wait)
        .L_back:
        NOP
        .L_loop:
        HMMA.16816.F32 R0, R0, R0, R0
        @P0 BRA `(.L_loop)
        EXIT
        .L_wait:
        NOP
        BRA `(.L_back)""")))
    assert loop == MainLoop("HMMA", 1, 2, copies=0)


def test_what_waits_behind_the_loop_belongs_to_it_and_is_no_copy():
    loop = main_loop(code(textwrap.dedent("""\
        BSSY B0, `(.L_after)
        .L_loop:
        UTCHMMA gdesc[UR14], gdesc[UR16], tmem[UR8]
        SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR13], R28
        @!P5 BRA `(.L_wait)
        .L_back:
        NOP
        BRA P0, `(.L_loop)
        .L_after:
        UTCHMMA gdesc[UR14], gdesc[UR16], tmem[UR8]
        UTCHMMA gdesc[UR14], gdesc[UR16], tmem[UR8]
        EXIT
        .L_wait:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR13], R28
        @!P5 BRA `(.L_wait)
        BRA `(.L_back)""")))
    assert loop == MainLoop("UTCHMMA", 1, 8, copies=0)


def test_without_a_loop_the_kernel_counts_as_a_whole():
    assert main_loop(code("LDG.E.128 R0, [R2]\nSTG.E R0, [R2]\nEXIT\nNOP")) == MainLoop("load", 1, 3, 0)


def test_wide_loads():
    """LTC128B says how much to fetch into the cache, not how much is loaded."""
    wide = ["LDG.E.128", "LDGSTS.E.BYPASS.LTC128B.128.ZFILL", "LDG.E.ENL2.256.CONSTANT", "UTMALDG.2D", "UBLKCP.S.G"]
    wide += ["global_load_dwordx4", "buffer_load_dwordx4"]
    narrow = ["LDG.E.LTC128B.64", "LDG.E", "LDGSTS.E.64", "LDS.128", "STG.E.128", "global_load_dwordx2", "ds_read_b128"]
    assert count_opcodes(map(Instruction, wide), WIDE) == len(wide) and count_opcodes(map(Instruction, wide), LOAD) == len(wide)
    assert count_opcodes(map(Instruction, narrow), WIDE) == 0


def test_branches_that_cannot_be_followed_are_refused():
    with pytest.raises(ValueError, match="BRX: where it branches to is computed"):
        code("BRX R0 -0x10")
    with pytest.raises(ValueError, match="BRA: no label .L_gone"):
        main_loop(code("@P0 BRA `(.L_gone)\nEXIT"))


def test_amdgcn():
    numbers = ["vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count", "group_segment_fixed_size"]
    lines = [".LBB0_1: ; loop", "\tv_mfma_f32_32x32x8_bf16 v[0:1], v2", "\tglobal_load_dwordx4 v[0:3], v4"]
    lines += ["\ts_cbranch_scc1 .LBB0_1", "\ts_endpgm", "\t.amdhsa_kernel k"]
    lines += [f"    .{name}:  {at + 1}" for at, name in enumerate(numbers)] + ["; Occupancy: 6"]
    found = read_amdgcn("\n".join(lines))
    assert (found.registers, found.stack, found.spills, found.shared, found.waves) == (1, 2, 7, 5, 6)
    assert main_loop(found) == MainLoop("v_mfma", 1, 3, 0)


@pytest.mark.parametrize(("arch", "registers", "shared", "dynamic", "threads", "columns", "wanted"), [
    ("sm_80", 128, 0, 0, 256, 0, (2, "registers")),  # 65536 / (128 · 256)
    ("sm_80", 129, 0, 0, 256, 0, (1, "registers")),  # 136 are allocated
    ("sm_80", 32, 0, 0, 1024, 0, (2, "threads, registers")),  # 2048 / 1024
    ("sm_86", 32, 0, 0, 1024, 0, (1, "threads")),  # 1536 / 1024
    ("sm_89", 16, 0, 0, 32, 0, (24, "blocks")),
    # 164 / (1 + 80 + 1 of the driver)
    ("sm_80", 32, 1024, 80 * 1024, 128, 0, (2, "shared memory")),
    ("sm_80", 32, 1024, 82 * 1024, 128, 0, (1, "shared memory")),
    ("sm_120", 32, 0, 99 * 1024, 128, 0, (1, "shared memory")),
    ("sm_120", 32, 0, 99 * 1024 + 1, 128, 0, (0, "shared memory")),
    ("sm_90", 32, 0, 227 * 1024, 128, 0, (1, "shared memory")),
    ("sm_100", 32, 0, 0, 128, 256, (2, "tensor memory")),  # 512 / 256
])  # fmt: skip
def test_occupancy(arch, registers, shared, dynamic, threads, columns, wanted):
    if occupancy.missing():
        pytest.skip(occupancy.missing())
    assert occupancy.occupancy(arch, registers, shared, dynamic, threads, columns) == wanted


def test_occupancy_of_amd():
    assert occupancy.occupancy_amd("gfx942", 3, 34816, 8) == (1, "registers, shared memory")
    assert occupancy.occupancy_amd("gfx942", 8, 0, 4) == (8, "registers")
    assert occupancy.occupancy_amd("gfx942", 8, 65537, 4) == (0, "shared memory")


def test_static_shared_memory_is_without_the_drivers():
    """cuobjdump counts 1024 reserved bytes from sm_90 on."""
    if MATMUL.kernel.missing("sm_90"):
        pytest.skip(MATMUL.kernel.missing("sm_90"))
    assert measure(MATMUL, "sm_90")["shared"] == 2 * 2 * 64 * 32 * 2


def test_no_chip_is_named_twice():
    twice = ((["sm_80", "sm_80 sm_90"], {}), ([ALL], {"sm_80": "twice"}), ([f"{ALL} sm_75"], {}))
    for chips, without in twice:
        with pytest.raises(ValueError, match="^planted: rows and without name"):
            Configuration("planted", Triton("nowhere:nothing", {}), Budget(1), dict.fromkeys(chips, Change(wide=2)), without)
    with pytest.raises(ValueError, match="^planted: rows name sm_90, triton 3.6.0; it is shipped for sm_80 sm_86 sm_89 sm_100"):
        Configuration("planted", Triton("nowhere:nothing", {}), Budget(1), {"sm_90, triton 3.6.0": {"wide": 2}}, {"sm_90": ""})


def test_a_row_inherits():
    rows = {"sm_86 sm_90": Change(units=2), "sm_90, triton 3.6.0": Change(spilled=4)}
    one = Configuration("planted", Triton("nowhere:nothing", {}), Budget(3, "HMMA", wide=5), rows)
    assert one.budget("sm_80") == one.budget("sm_80", "3.6.0") == Budget(3, "HMMA", wide=5)
    assert one.budget("sm_86") == one.budget("sm_90") == one.budget("sm_90", "3.7.0") == Budget(3, "HMMA", units=2, wide=5)
    assert one.budget("sm_90", "3.6.0") == Budget(3, "HMMA", units=2, wide=5, spilled=4)


def test_a_row_states_only_what_differs():
    for one in GATES:
        for chips, change in one.rows.items():
            assert change and not change.items() & dataclasses.asdict(one.default).items(), (one.name, chips)


def test_fingerprint_of_cuda(tmp_path):
    (tmp_path / "one.h").write_text("// one")
    source = tmp_path / "k.cu"
    source.write_text('#include "one.h"\n#include <stdint.h>\n')
    one = dataclasses.replace(MATMUL, kernel=Cuda(source, "k", 32))
    first = one.fingerprint()
    assert dataclasses.replace(one, name="other").fingerprint() == first
    assert dataclasses.replace(one, kernel=Cuda(source, "k", 32, ("-DX",))).fingerprint() != first
    (tmp_path / "one.h").write_text("// two")
    assert one.fingerprint() != first


def test_fingerprint_of_triton(tmp_path, monkeypatch):
    if CORPUS[0].kernel.missing("gfx942"):
        pytest.skip(CORPUS[0].kernel.missing("gfx942"))
    monkeypatch.syspath_prepend(tmp_path)
    text = """
        import triton
        import triton.language as tl
        FACTOR = tl.constexpr(2)
        @triton.jit
        def half(x):
            return x / FACTOR
        @triton.jit
        def whole(x, n):
            tl.store(x, half(tl.load(x)))
    """

    def fingerprint(text, **args):
        (tmp_path / "planted.py").write_text(textwrap.dedent(text))
        sys.modules.pop("planted", None)
        kernel = Triton("planted:whole", {"x": 1, "n": 16} | args)
        return dataclasses.replace(CORPUS[2], kernel=kernel).fingerprint()

    first = fingerprint(text)
    assert fingerprint("\n\n# further down\n" + textwrap.dedent(text)) == first
    for old, new in (("x / FACTOR", "x / FACTOR + 1"), ("constexpr(2)", "constexpr(35)"), ("tl.store(x,", "tl.store(x + n,")):
        assert fingerprint(text.replace(old, new)) != first
    assert fingerprint(text, n=17) != first


def test_only_what_changed_is_compiled(tmp_path, monkeypatch):
    if MATMUL.kernel.missing("sm_80"):
        pytest.skip(MATMUL.kernel.missing("sm_80"))
    compiled = []
    monkeypatch.setattr(table, "measure", lambda one, arch: compiled.append(arch) or {"units": len(compiled)})
    found, kept = table.current(MATMUL, "sm_80", Table())
    assert compiled == ["sm_80"] and not kept
    old = Table({(MATMUL.name, "sm_80"): found})
    old.write(tmp_path / "table.json")
    old = Table.read(tmp_path / "table.json")
    assert table.current(MATMUL, "sm_80", old) == (found, True) and len(compiled) == 1
    changed = dataclasses.replace(MATMUL, kernel=dataclasses.replace(MATMUL.kernel, options=("-DX",)))
    again, kept = table.current(changed, "sm_80", old)
    assert len(compiled) == 2 and not kept
    assert table.differences(found, again) == ["units: 1 in the table, 2 now"]
    assert table.differences(None, again) == ["not in the table"]
    assert table.differences(found | {"made": "nvcc 1.0"}, again) == []


def test_other_tritons_in_the_table(tmp_path):
    row = {"registers": 8, "fingerprint": "a"}
    rows = {("k", "sm_90", "3.6.0"): {"ptxas": "12.8", "fingerprint": "b"}, ("k", "sm_90", "3.9.0"): {"error": "none"}}
    rows["k", "sm_100", "3.6.0"] = {"hazards": 2, "hazard": "MOV writes R8", "ptxas": "12.9", "fingerprint": "c"}
    Table({("k", "sm_90"): row}, rows).write(tmp_path / "table.json")
    assert len((tmp_path / "table.json").read_text().splitlines()) == 8
    again = Table.read(tmp_path / "table.json")
    assert again.rows == {("k", "sm_90"): row} and again.others == rows
    counts = [
        "3.6.0 | sm_100 | 12.9 | 1 | 1 | 0 | 0", "3.6.0 | sm_90 | 12.8 | 1 | 0 | 0 | 0", "3.9.0 | sm_90 |  | 1 | 0 | 0 | 1",
    ]  # fmt: skip
    assert again._of_others()[3:] == [f"| {line} |" for line in counts]


def test_a_row_of_another_triton_goes_stale():
    if CORPUS[0].kernel.missing("sm_90"):
        pytest.skip(CORPUS[0].kernel.missing("sm_90"))
    one, arch = versions.configurations_for(GATES, "3.6.0")[0]
    first = one.fingerprint(arch, "3.6.0")
    assert first == one.fingerprint(arch, "3.6.0") and len({first, one.fingerprint(arch, "3.7.1"), one.fingerprint(arch)}) == 3
    changed = dataclasses.replace(one.kernel_on(arch), stages=one.kernel_on(arch).stages + 1)
    assert dataclasses.replace(one, special={arch: changed}).fingerprint(arch, "3.6.0") != first
    only = dataclasses.replace(one, special={**one.special, f"{arch}, triton 3.6.0": changed})
    assert only.kernel_on(arch, "3.6.0") is changed and only.kernel_on(arch) == only.kernel_on(arch, "3.9.0") == one.kernel_on(
        arch
    )
    assert only.fingerprint(arch, "3.6.0") != first and only.fingerprint(arch) == one.fingerprint(arch)


def test_another_triton_compiles_in_a_process_of_its_own(monkeypatch, tmp_path):
    """Here the installed one stands for it; a folder with another version is not taken for the one
    that was asked for."""
    if CORPUS[0].kernel.missing("sm_90"):
        pytest.skip(CORPUS[0].kernel.missing("sm_90"))
    import triton

    kernel = corpus("cast_dot", CAST | {"STAGES": 1})
    wrong = dataclasses.replace(kernel, args=kernel.args | {"BM": 48})
    monkeypatch.setattr(versions, "installed", lambda version: Path(triton.__file__).parents[1])
    asked = [("k", "sm_90", kernel), ("wrong", "sm_90", wrong)]
    rows = versions._process(triton.__version__, asked, str(tmp_path))
    assert rows["k", "sm_90"] == {"ptxas": kernel.assembler("sm_90")}
    assert rows["wrong", "sm_90"]["error"].startswith("CompilationError")
    with pytest.raises(RuntimeError, match=r"^triton 3.0.0: [\s\S]*AssertionError: <module 'triton'"):
        versions._process("3.0.0", asked[:1], str(tmp_path))


def test_the_installed_triton_by_the_ptxas_of_launches(tmp_path):
    """Of sm_90 alone, in a row of its own; that Triton's own ptxas made the other."""
    kernel = corpus("cast_dot", CAST | {"STAGES": 1})
    for version in [version for version in versions.other_versions() if versions.PTXAS in version]:
        assert {arch for _, arch in versions.configurations_for(GATES, version)} == {"sm_90"}
        later = version.partition(versions.PTXAS)[2]
        assert versions._process(version, [("k", "sm_90", kernel)], str(tmp_path))["k", "sm_90"] == {"ptxas": later}
        assert later != kernel.assembler("sm_90")


def test_the_table_for_people():
    table = Table.read(HERE / "table.json")
    others = {(arch, version) for _, arch, version in table.others}
    text, row = table.markdown(), table.rows["lora 128x128x64, 8 warps, 3 stages", "sm_80"]
    assert len(text.splitlines()) == 2 + len(table.rows) + (3 if others else 0) + len(others)
    loop = f"{row['instructions']}: 72 HMMA | {row['instructions'] / 72:.2f}"
    assert f"| 2 (16 of 64) | registers, shared memory | {loop} | 25 of 28 |" in text


def test_what_is_missing_is_said(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(nvcc, "find_nvcc", lambda: None)
        with pytest.raises(FileNotFoundError, match="^nvcc is in none of the wheel nvidia-cuda-nvcc, CUDA_HOME and PATH"):
            measure(MATMUL, "sm_80")
    with monkeypatch.context() as patch:
        patch.setattr(sass, "find_tool", lambda name, folder="bin": None)
        assert sass.missing() == "cuobjdump and nvdisasm in none of the wheel triton, CUDA_HOME and PATH"
    with monkeypatch.context() as patch:
        patch.setattr(occupancy, "find_compiler", lambda: None)
        assert "no C++ compiler" in (occupancy.missing() or "")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "triton", None)
        assert "triton is not installed" in (CORPUS[0].kernel.missing("gfx942") or "")


def test_the_command(tmp_path):
    """One row passes, one is over its budget: the table has both, and the command fails."""
    if MATMUL.kernel.missing("sm_80"):
        pytest.skip(MATMUL.kernel.missing("sm_80"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "configurations.py").write_text(textwrap.dedent("""
        from dataclasses import replace
        from lora_kernels.testing.gates import Change
        from tests.gates.configurations import GATES
        GATES = [replace(GATES[-1], rows={"sm_90": Change(per=2)}, without={"sm_86 sm_89 sm_100 sm_120": "not asked"})]
    """))
    command = [sys.executable, "-m", "lora_kernels.testing.gates", "mine", "--jobs", "1"]
    places = os.pathsep.join([str(tmp_path), str(HERE.parents[1])])
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": places}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"BROKEN: {MATMUL.name}, sm_90: main loop: 7.06 instructions for each HMMA, 2 allowed" in done.stdout
    assert done.stdout.endswith("2 rows in mine/table.json, 1 broken, 0 not compiled\n")
    assert set(Table.read(tmp_path / "mine" / "table.json").rows) == {(MATMUL.name, "sm_80"), (MATMUL.name, "sm_90")}
