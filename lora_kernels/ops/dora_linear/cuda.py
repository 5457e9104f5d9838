"""CUDA C++: the kernels of weight_norm and lora_linear one after the other, where Triton's one
launch does not run."""

from lora_kernels.ops.cuda_alone import refuse_beside_triton
from lora_kernels.ops.dora_linear.two_ops import norm_then_linear
from lora_kernels.ops.launch import KERNEL_SUFFIX, refuse_cuda
from lora_kernels.ops.lora_linear.cuda_skinny import EXPAND
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements


def refusal(call):
    x = call.x
    if x.dtype not in KERNEL_SUFFIX:
        return f"x is {x.dtype}; the kernels read bfloat16 or float16"
    tensors = {"a": call.a, "b": call.b, "bias": call.bias, "magnitude": call.magnitude}
    return (
        refuse_dtypes(**tensors)
        or refuse_negated(x=x, w=call.w, **tensors)
        or refuse_cuda(x, EXPAND)
        or refuse_beside_triton("of few rows they read W once for all")
    )


@implements("dora_linear", "cuda", refusal)
def forward(call):
    return norm_then_linear(call)
