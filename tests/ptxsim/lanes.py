"""One instruction on a warp of inputs: a kernel that loads them, runs it and stores what it
gives."""

import numpy as np
import torch

from lora_kernels.ptxsim import Kernel

RAN: set[str] = set()  # the instructions that the tests of this folder have run so far
REGISTER = {1: ".pred", 16: ".b16", 32: ".b32", 64: ".b64"}
KIND = {
    "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64,
    "f32": np.float32, "f64": np.float64, "f16": np.float16, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
}  # fmt: skip


def kernel_text(body, registers, parameters, target="sm_80"):
    declared = ",\n".join(f"  .param .{kind} {name}" for name, kind in parameters)
    lines = "\n".join(f"  {line}" for line in (*registers, *body, "ret;"))
    return f".version 8.8\n.target {target}\n.address_size 64\n.visible .entry k(\n{declared}\n)\n{{\n{lines}\n}}\n"


def run_lanes(lines, inputs, out, threads=32, **options):
    """Each input is a numpy array [threads], in `lines` %a, %b, … of 16, 32 or 64 bits; the result
    is %out."""
    names = "abcdefgh"[: len(inputs)]
    width = {name: value.dtype.itemsize * 8 for name, value in zip(names, inputs, strict=True)}
    bits = np.dtype(out).itemsize * 8
    registers = [f".reg .b32 %t; .reg .b64 %at<{len(inputs) + 2}>; .reg .b64 %base<{len(inputs) + 2}>;"]
    registers += [f".reg {REGISTER[width[name]]} %{name};" for name in names] + [f".reg {REGISTER[bits]} %out;"]
    body = ["mov.u32 %t, %tid.x;"]
    for i, name in enumerate(names):
        body += [
            f"ld.param.u64 %base{i}, [p{i}];",
            f"mad.wide.u32 %at{i}, %t, {width[name] // 8}, %base{i};",
            f"ld.global.b{width[name]} %{name}, [%at{i}];",
        ]
    last = len(inputs)
    body += lines
    body += [
        f"ld.param.u64 %base{last}, [p{last}];",
        f"mad.wide.u32 %at{last}, %t, {bits // 8}, %base{last};",
        f"st.global.b{bits} [%at{last}], %out;",
    ]
    parameters = [(f"p{i}", "u64") for i in range(last + 1)]
    tensors = [torch.from_numpy(np.ascontiguousarray(value).view(np.uint8).copy()) for value in inputs]
    result = torch.full((threads * bits // 8,), 0xEE, dtype=torch.uint8)
    run = Kernel(kernel_text(body, registers, parameters)).launch((1,), (threads,), [*tensors, result], [result], **options)
    assert not run.errors
    return result.numpy().view(out)
