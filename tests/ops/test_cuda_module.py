"""The module _cuda and what calls it, where there is no GPU: its kernels, how it refuses, what it
says of an error."""

import re
from types import SimpleNamespace

import pytest
import torch

from lora_kernels.ops import launch
from lora_kernels.ptxsim.cuda_structs import struct_fields
from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc

if find_nvcc() is None:
    pytest.skip(f"{MISSING} (requirements-dev.txt has it for Linux on x86-64)", allow_module_level=True)
from lora_kernels import _cuda  # where there is nvcc, it must be built

FIELDS = struct_fields(launch.CSRC / "weight_norm" / "cuda.cu", "weight_norm_bf16_16")
NORM = (1, 2, 3, 4, 64, 64, 16, 64, 64, 16, 0.5)  # a struct of weight_norm's


def test_every_kernel_of_the_sources_is_there():
    texts = [path.read_text() for path in launch.CSRC.glob("*/cuda*.cu")]
    named = {name for text in texts for name in re.findall(r"^LK_(?!TABLE)[A-Z_]+\((\w+),", text, re.MULTILINE)}
    tables = {name for text in texts for name in re.findall(r"LK_KERNEL(?:_OF)?\((\w+)", text)}
    alone = r'^extern "C" __global__ void __launch_bounds__\(\d+\)\s+(\w+)\('  # of no macro
    plain = {name for text in texts for name in re.findall(alone, text, re.MULTILINE)}
    assert set(_cuda.kernels) == tables == named | plain
    assert sorted(_cuda.kernels.values()) == list(range(len(tables)))


@pytest.mark.parametrize(("args", "message"), [
    (NORM[:-2] + NORM[-1:], "weight_norm_bf16_16 on cuda:0, grid 3x1x1, .*: its struct has 88 bytes, found 80"),
    (NORM + (1,) * 120, "at most 1024 bytes"),
])  # fmt: skip
def test_a_struct_that_does_not_fit(args, message):
    with pytest.raises(ValueError, match=message):
        _cuda.launch(_cuda.kernels["weight_norm_bf16_16"], 3, 1, 1, 128, 0, False, 0, 0, args)


def test_a_kernel_that_is_not_there():
    with pytest.raises(ValueError, match="there is no kernel 999"):
        _cuda.launch(999, 1, 1, 1, 128, 0, False, 0, 0, ())


def test_numbers_of_a_struct():
    assert _cuda.pack((1, None, 0.5)) == 24 and _cuda.pack((0.5, 0.5, 1)) == 16 and _cuda.pack(()) == 0
    # of a map, at multiples of 64
    assert _cuda.pack((1, bytes(128), 0.5)) == 256 and _cuda.pack((bytes(128), 1)) == 192
    tensor = torch.zeros(4)
    assert _cuda.pack((tensor, tensor, 0.5)) == _cuda.pack((tensor.data_ptr(), 1, 0.5))
    with pytest.raises(TypeError, match="a tensor, a map, a number or None, found str"):
        _cuda.pack(("x",))
    with pytest.raises(TypeError, match="a map is a tuple of 7"):
        _cuda.pack(((tensor, True),))
    with pytest.raises(OverflowError):
        _cuda.pack((2**64,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: bench/gpu launches there")
def test_an_error_names_the_kernel_the_launch_and_the_shapes(monkeypatch):
    monkeypatch.setattr(launch, "_gpu_properties", lambda _: (80, 108))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    args = dict(zip(FIELDS, (torch.zeros(64, 32, dtype=torch.bfloat16), *NORM[1:]), strict=True))
    with pytest.raises(RuntimeError) as e:
        launch.launch_cuda("", "weight_norm_bf16_16", (5,), 128, args, [SimpleNamespace(device=torch.device("cuda", 0))], 64)
    launched = r"weight_norm_bf16_16 on cuda:0, grid 5x1x1, 128 threads, 64 bytes of shared memory: cudaError\w+: "
    assert re.match(launched, str(e.value))
    assert "arguments: w [64, 32] bfloat16, a 2, b 3, norm 4, rows 64" in str(e.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: bench/gpu launches there")
def test_a_map_without_a_driver():
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: cudaError"):
        _cuda.tensor_map(0, True, 64, 64, 64, 64, 64)
    with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: cudaError"):
        _cuda.pack(((torch.zeros(64, 64), True, 64, 64, 64, 64, 64),))


@pytest.mark.parametrize(("binaries", "texts", "arch", "runs"), [
    ("80 86 90 100", "80", 90, True), ("90a", "", 90, True), ("80", "90", 90, False), ("80 90", "", 100, False),
])  # fmt: skip
def test_a_source_that_is_for_one_gpu(monkeypatch, binaries, texts, arch, runs):
    monkeypatch.setattr(launch, "_cuda", SimpleNamespace(ARCHITECTURES=binaries, PTX=texts))
    launch.refuse_binary.cache_clear()
    reason = launch.refuse_binary(arch, "lora_linear/cuda_specialised_sm90a.cu")
    launch.refuse_binary.cache_clear()
    assert (reason is None) == runs and (runs or "is for sm_90a alone, and built for sm_" in reason)


@pytest.mark.parametrize(("binaries", "texts", "runs"), [
    ("80 86 90", "80", {80, 86, 87, 89, 90, 100, 120, 121}),
    ("80 90", "", {80, 86, 87, 89, 90}),
    ("86", "90", {86, 87, 89, 90, 100, 120, 121}),
])  # fmt: skip
def test_gpus_that_the_build_is_for(monkeypatch, binaries, texts, runs):
    monkeypatch.setattr(launch, "_cuda", SimpleNamespace(ARCHITECTURES=binaries, PTX=texts))
    launch.refuse_binary.cache_clear()
    reasons = {arch: launch.refuse_binary(arch) for arch in (80, 86, 87, 89, 90, 100, 120, 121)}
    launch.refuse_binary.cache_clear()
    assert {arch for arch, why in reasons.items() if why is None} == runs
    assert all(f"not for sm_{arch}; TORCH_CUDA_ARCH_LIST" in why for arch, why in reasons.items() if why)


def test_without_the_module(monkeypatch):
    monkeypatch.setattr(launch, "_cuda", None)
    monkeypatch.setattr(launch, "_no_cuda", "not built: no nvcc")
    launch.refuse_binary.cache_clear()
    assert launch.refuse_binary(80) == "not built: no nvcc" == launch.cuda_build()
    launch.refuse_binary.cache_clear()
