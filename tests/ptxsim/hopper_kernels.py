"""Triton kernels with descriptors of tensors, which become copies in bulk (TMA) from sm_90 on."""

import triton
import triton.language as tl


@triton.jit
def tile(dx, dw, dy, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPECIALISED: tl.constexpr):
    """One tile of y = x wᵀ; SPECIALISED: other warps copy than multiply."""
    first, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    sums = tl.zeros((BM, BN), tl.float32)
    for depth in tl.range(0, k, BK, warp_specialize=SPECIALISED):
        sums = tl.dot(dx.load([first, depth]), dw.load([column, depth]).T, sums)
    dy.store([first, column], sums.to(dy.dtype))


@triton.jit
def given(dx, dw, dy, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPECIALISED: tl.constexpr):
    """The descriptors come from the host."""
    tile(dx, dw, dy, k, BM, BN, BK, SPECIALISED)


@triton.jit
def with_descriptors(x, w, y, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPECIALISED: tl.constexpr):
    """The kernel makes the descriptors."""
    dx = tl.make_tensor_descriptor(x, [m, k], [k, 1], [BM, BK])
    dw = tl.make_tensor_descriptor(w, [n, k], [k, 1], [BN, BK])
    dy = tl.make_tensor_descriptor(y, [m, n], [n, 1], [BM, BN])
    tile(dx, dw, dy, k, BM, BN, BK, SPECIALISED)
