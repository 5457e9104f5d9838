"""CUDA C++: the kernels of weight_norm and lora_linear one after the other, where Triton's one launch does not run."""

from lora_kernels.ops.alone import refuse_beside_triton
from lora_kernels.ops.launch import KINDS, refuse_cuda
from lora_kernels.ops.lora_linear import lora_linear
from lora_kernels.ops.lora_linear.cuda_thin import EXPAND
from lora_kernels.ops.refusals import refuse_dtypes, refuse_negated
from lora_kernels.ops.registry import implements
from lora_kernels.ops.weight_norm import dora_gain, weight_norm


def refusal(x, w, a, b, scale, bias, magnitude):
    if x.dtype not in KINDS:
        return f"x is {x.dtype}; the kernels read bfloat16 or float16"
    tensors = {"a": a, "b": b, "bias": bias, "magnitude": magnitude}
    return (
        refuse_dtypes(**tensors)
        or refuse_negated(x=x, w=w, **tensors)
        or refuse_cuda(x, EXPAND)
        or refuse_beside_triton("of few rows they read W once for all")
    )


@implements("dora_linear", "cuda", refusal)
def forward(x, w, a, b, scale, bias, magnitude):
    norm = weight_norm(w, a, b, scale)
    return lora_linear(x, w, a, b, scale, bias, dora_gain(magnitude, norm)), norm
