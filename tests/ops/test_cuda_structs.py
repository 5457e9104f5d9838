"""What a launch names of a kernel's struct is what its source declares; every simulated launch is
compared."""

import re

import pytest
import torch

from lora_kernels import use_backend, weight_norm
from lora_kernels.ops import launch
from lora_kernels.ops.weight_norm import cuda
from lora_kernels.ptxsim import device
from lora_kernels.ptxsim.cuda_structs import check_fields, struct_fields
from lora_kernels.ptxsim.nvcc import MISSING, find_nvcc

SOURCE = """
#include "other.cuh"
// struct Gone { int64_t g; };
struct Pair {
  const void *one, *two;  // [m, n] [n]
  int64_t kind;
  __device__ float at(int64_t i) const {
    if (kind == 1) { return one_of(i); }
    return Other{i}.y;
  }
};
constexpr int COUNT = 2, BYTES = 16 * COUNT;
struct Args {
  void* out;  // [m]; may be null
  Inner inner;
  Pair pairs[COUNT];
  const int64_t* at;
  float scale, factors[3];
};
#define LK_MANY(name, Struct, T) \\
  extern "C" __global__ void name(const __grid_constant__ lk::Struct p) { \\
    run<T>(p);                                                          \\
  }
LK_MANY(many_bf16, Pair, __nv_bfloat16)
extern "C" __global__ void plain(const __grid_constant__ lk::Args p) {}
"""
PAIR = ("one", "two", "kind")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "other.cuh").write_text("struct Inner {\n  int64_t m;\n};\n")
    path = tmp_path / "kernels.cu"
    path.write_text(SOURCE)
    return path


def test_fields_of_a_struct(source):
    pairs = [f"pairs[{i}].{name}" for i in range(2) for name in PAIR]
    wanted = ("out", "inner.m", *pairs, "at", "scale", "factors[0]", "factors[1]", "factors[2]")
    assert struct_fields(source, "plain") == wanted
    assert struct_fields(source, "many_bf16") == PAIR
    with pytest.raises(ValueError, match="^kernels.cu has no kernel many_f16 with a struct$"):
        struct_fields(source, "many_f16")


@pytest.mark.parametrize("given", [PAIR[:2], ("two", "one", "kind"), ("one", "two", "sort"), (*PAIR, "more")], ids=str)
def test_other_fields_are_refused(source, given):
    check_fields(source, "many_bf16", PAIR)
    with pytest.raises(TypeError, match="^many_bf16: its struct in kernels.cu has the fields one two kind, found "):
        check_fields(source, "many_bf16", given)


def test_every_kernel_has_a_struct():
    """All fields of pointers and numbers: what the parser does not know of, a launch could not
    name."""
    for path in launch.CSRC.glob("*/cuda*.cu"):
        text = path.read_text()
        kernels = re.findall(r"LK_KERNEL(?:_OF)?\((\w+)", text)
        assert kernels, path
        for kernel in kernels:
            found = struct_fields(path, kernel)
            assert found and all(re.fullmatch(r"\w+(\[\d\])?(\.\w+)*", name) for name in found), (path, kernel, found)


@pytest.mark.skipif(find_nvcc() is None, reason=MISSING)
def test_a_launch_that_names_another_order_is_an_error(monkeypatch):
    real = cuda.launch_cuda

    def swapped(source, kernel, grid, threads, args, *rest, **more):
        return real(source, kernel, grid, threads, {"a": args["a"], **args}, *rest, **more)

    monkeypatch.setattr(cuda, "launch_cuda", swapped)
    w, a, b = (torch.randn(shape).bfloat16() for shape in ((64, 64), (16, 64), (64, 16)))
    with use_backend("cuda", simulate=True), device(80):
        with pytest.raises(TypeError, match="^weight_norm_bf16_16: its struct in cuda.cu has the fields w a b norm rows"):
            weight_norm(w, a, b, 1.0)
