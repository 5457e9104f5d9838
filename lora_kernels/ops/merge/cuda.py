"""CUDA C++ for 16-bit W: csrc/merge/cuda.cu where A and B have the type of W, few ranks, and rows
in pieces of 16 bytes; else, where Triton does not run, csrc/merge/cuda_any.cu."""


from lora_kernels.ops.chips import nearest_chip
from lora_kernels.ops.cuda_alone import refuse_beside_triton
from lora_kernels.ops.cuda_shared_memory import shared_of_update, shared_of_update_any
from lora_kernels.ops.launch import (
    KERNEL_SUFFIX,
    architecture,
    ceil_div,
    launch_cuda,
    multiprocessors,
    power_of_two,
    refuse_cuda,
    vector_fields,
)
from lora_kernels.ops.lora_linear.cuda_skinny import factors
from lora_kernels.ops.merge.both_ops import implements_merge
from lora_kernels.ops.refusals import refuse_dtypes, refuse_factors, refuse_negated, refuse_rows
from lora_kernels.ops.tables.tiles import compiled

SOURCE, ANY = "merge/cuda.cu", "merge/cuda_any.cu"
MOST = 128  # ranks, as in the source


def refuse_pieces(w, a, b, out):
    """Why csrc/merge/cuda.cu cannot do it."""
    return refuse_factors(w, a, b, MOST) or (None if out is None else refuse_rows(out=out))


def refusal(call):
    w, a, b, gain, out = call.w, call.a, call.b, call.gain, getattr(call, "out", None)
    if w.dtype not in KERNEL_SUFFIX:
        return f"w is {w.dtype}; the kernels read bfloat16 or float16"
    reason = refuse_pieces(w, a, b, out)
    return (
        refuse_dtypes(a=a, b=b, gain=gain)
        or refuse_negated(w=w, a=a, b=b, gain=gain, out=out)
        or refuse_cuda(w, ANY)
        or (reason and refuse_beside_triton(reason))
    )


@implements_merge("cuda", refusal)
def merge(call, out):
    w, a, b, gain, scale, in_place = call.w, call.a, call.b, call.gain, call.scale, out.data_ptr() == call.w.data_ptr() != 0
    pieces, (n, k) = refuse_pieces(w, a, b, out) is None, w.shape
    t = compiled("merge.cu" if pieces else "merge_any.cu")
    # so many columns a block that each multiprocessor has two, but enough to fill the pipeline
    slots = 2 * nearest_chip(architecture(w), multiprocessors(w)).multiprocessors
    part = t.columns * max(512 // t.columns, ceil_div(ceil_div(k, t.columns), max(1, slots // max(1, ceil_div(n, t.rows)))))
    grid, (makes, changes) = (ceil_div(k, part), ceil_div(n, t.rows)), ([], [out]) if in_place else ([out], [])
    if pieces:
        ranks = power_of_two(a.shape[0], most=t.ranks)
        args = {
            "w": w, "a": a, "b": b, "out": out, **vector_fields("gain", gain), "rows": n, "columns": k, "rank": a.shape[0],
            "w_row": w.stride(0), "a_row": a.stride(0), "b_row": b.stride(0), "out_row": out.stride(0), "part": part,
            "scale": float(scale),
        }  # fmt: skip
        kernel, shared = f"merge_{KERNEL_SUFFIX[w.dtype]}_{ranks}", shared_of_update(t, ranks)
        launch_cuda(SOURCE, kernel, grid, t.threads, args, makes, shared, changes=changes)
        return
    args = {
        "w": w, **factors(a, b, scale), "out": out, **vector_fields("gain", gain), "rows": n, "columns": k,
        "w_row": w.stride(0), "w_column": w.stride(1), "out_row": out.stride(0), "out_column": out.stride(1), "part": part,
    }  # fmt: skip
    kernel, shared = f"merge_any_{KERNEL_SUFFIX[w.dtype]}", shared_of_update_any(t)
    launch_cuda(ANY, kernel, grid, t.threads, args, makes, shared, changes=changes)
