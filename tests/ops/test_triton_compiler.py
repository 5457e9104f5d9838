"""Which loops are compiled how, by which Triton and which ptxas."""

import collections
import types
from pathlib import Path

import pytest
import torch

from lora_kernels import lora_linear, use_backend
from lora_kernels.ops import missing_backends
from lora_kernels.ptxsim import device
from lora_kernels.testing import make_problem

if "triton" in missing_backends():
    pytest.skip(missing_backends()["triton"], allow_module_level=True)

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from lora_kernels.ops import triton_compiler
from lora_kernels.ops.dispatch import forced_candidate
from lora_kernels.ops.launch import recorded
from lora_kernels.ops.triton_compiler import assembler, assembling, choose_assembler, sound_schedule

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
VERSIONS = [(3, 6, 0), (3, 7, 0), (3, 7, 1), (3, 8, 0), (3, 9, 0)]
NAMES = ["shrink_kernel", "forward_kernel", "both_sides_kernel", "outer_kernel", "input_gradient_kernel"]


def of(arch, dtype=BF16, other=None, precision="half", rows=64, warps=4, **flags):
    with use_backend("triton", simulate=True), device(arch):
        return sound_schedule(
            torch.empty(0, dtype=dtype), [torch.empty(0, dtype=other or dtype)], precision, rows, warps, 3, **flags
        )


@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_the_rule(monkeypatch, version):
    monkeypatch.setattr(triton_compiler, "version", lambda: version)
    copied = 3 if version >= (3, 7, 1) else 1
    for arch in (90, 100, 103):
        assert of(arch) == (4, copied) and of(arch, mapped=True) == (4, 3)  # tiles as they are
        assert of(arch, narrow=True) == ((2, 3) if copied == 1 else (4, 3))
        for sound_everywhere in ({"rows": 32}, {"warps": 2}, {"dtype": F32, "precision": "ieee"}):
            assert of(arch, changed=True, **sound_everywhere) == (sound_everywhere.get("warps", 4), 3)
    for narrow, wanted in ((False, (4, 1)), (True, (2, 3))):
        # wgmma takes u from registers
        assert of(90, changed=True, mapped=True, narrow=narrow) == wanted
        assert of(90, F16, F32, mapped=True, narrow=narrow) == wanted
        assert of(90, F32, precision="bf16x6", mapped=True, narrow=narrow) == wanted
        # two products on the same sums
        assert of(100, BF16, F32, mapped=True, narrow=narrow) == wanted
        assert of(100, F32, precision="bf16x6", mapped=True, narrow=narrow) == wanted
    assert of(90, BF16, F32, mapped=True) == of(100, changed=True, mapped=True) == (4, 3)
    for arch in (80, 86, 89, 120):
        assert of(arch, F16, F32, changed=True) == (4, 3)


def test_the_version():
    assert triton_compiler.version() == tuple(map(int, triton.__version__.split("+")[0].split(".")))


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 103, 120])
@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_nothing_is_refused(monkeypatch, version, arch):
    """lora_linear, with dropout on the base and a gain, forward and backward, whatever Triton."""
    monkeypatch.setattr(triton_compiler, "version", lambda: version)
    for dtype in (BF16, F16, F32):
        p = make_problem(130, 64, 64, 16, dtype, dropout=0.1, gain=True)
        with use_backend("triton", simulate=True), device(arch), recorded() as launches:
            p.require_grad()
            with forced_candidate("two launches"):
                y = lora_linear(*p.arguments())
            with forced_candidate("fused"):
                y.backward(torch.empty_like(y))
        assert [launch.kernel.fn.__name__ for launch in launches] == NAMES


@triton.jit
def copies(x, y, N: tl.constexpr):
    tl.store(y + tl.arange(0, N), tl.load(x + tl.arange(0, N)))


def compiled(n):
    """Triton's key of what it made for sm_90, and the version of its PTX, which is that of its
    ptxas."""
    source = ASTSource(fn=copies, signature={"x": "*fp32", "y": "*fp32", "N": "constexpr"}, constexprs={(2,): n})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return made.metadata.hash, next(line for line in made.asm["ptx"].splitlines() if line.startswith(".version"))


def release(path):
    return tuple(map(int, knobs.NvidiaTool.from_path(path).version.split(".")))


def test_the_assembler(monkeypatch):
    """The latest that Triton carries, where that makes sm_90 sound; what the user names goes
    before."""
    carried = [nvidia.get_ptxas(90), knobs.nvidia.ptxas_blackwell]
    later = [tool.path for tool in carried if release(tool.path) >= (13, 3)]
    assert assembler(90) == (later[0] if later else carried[0].path)
    for arch in (80, 89, 100, 120):
        assert assembler(arch) == nvidia.get_ptxas(arch).path
    mine = Path(carried[0].path).parent / ".." / "bin" / "ptxas"
    with knobs.nvidia.scope():
        knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell = str(mine)
        assert assembler(90) == str(mine)


def test_only_what_is_ours_is_assembled_by_it(monkeypatch):
    """A kernel that is prepared is compiled by the later ptxas and kept under another key; all
    others, before, meanwhile and after, by Triton's."""
    monkeypatch.setattr(triton_compiler, "driver_version", lambda: 13000)
    before = compiled(64)
    usual = release(nvidia.get_ptxas(90).path)
    calls = []

    def set_up():
        ours.compile = lambda *args, **options: calls.append((args, options)) or compiled(64)

    ours = types.SimpleNamespace(device_caches=collections.defaultdict(set_up))
    choose_assembler(ours, 0, 90)
    found = ours.compile("source", target="sm_90")
    assert calls == [(("source",), {"target": "sm_90"})]
    assert compiled(64) == before and release(nvidia.get_ptxas(90).path) == usual
    if release(assembler(90)) == usual:
        assert found == before
    else:
        assert found[0] != before[0] and found[1] > before[1]
    with pytest.raises(KeyError), assembling(90):
        raise KeyError
    assert compiled(32)[1] == before[1]


def test_a_machine_without_a_driver_has_version_0(monkeypatch):
    def load(name):
        raise OSError(f"{name}: no such file")

    triton_compiler.driver_version.cache_clear()
    monkeypatch.setattr(triton_compiler.ctypes, "CDLL", load)
    assert triton_compiler.driver_version() == 0
    triton_compiler.driver_version.cache_clear()


def test_triton_without_the_later_ptxas_keeps_its_own(monkeypatch):
    class Knobs:
        ptxas = knobs.nvidia.ptxas

        @property
        def ptxas_blackwell(self):
            raise RuntimeError("Cannot find ptxas-blackwell")

    monkeypatch.setattr(knobs, "nvidia", Knobs())
    monkeypatch.setattr(nvidia, "get_ptxas", lambda arch: Knobs.ptxas)
    assert assembler(90) == Knobs.ptxas.path


@pytest.mark.parametrize(("driver", "arch"), [(12080, 90), (13000, 80), (13000, 100)])
def test_where_triton_s_own_is_left(monkeypatch, driver, arch):
    """An older driver does not load what a ptxas of CUDA 13 makes."""
    monkeypatch.setattr(triton_compiler, "driver_version", lambda: driver)
    ours = types.SimpleNamespace(device_caches={0: None}, compile=triton.compile)
    choose_assembler(ours, 0, arch)
    assert ours.compile is triton.compile
