"""A textbook matmul in Triton with something elementwise between the load of A and the product.

On sm_90 A then is a register operand of wgmma, which runs on while the pipelined loop goes round:
code that writes those registers before the wait is wrong. Triton's own pipeliner (to 3.7) and ptxas
before 13.3 make such code.
"""

import triton
import triton.language as tl


@triton.jit
def matmul(
    a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, KIND: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for at in tl.range(0, k, BK, num_stages=STAGES):
        x = tl.load(a + rm[:, None] * k + (at + rk)[None, :])  # [BM, BK]
        y = tl.load(b + (at + rk)[:, None] * n + rn[None, :])  # [BK, BN]
        if KIND == "plain":
            sums = tl.dot(x, y, sums)
        elif KIND == "cast":  # of float32
            sums = tl.dot(x.to(tl.bfloat16), y, sums)
        elif KIND == "where":  # as dropout is
            sums = tl.dot(tl.where(((at + rk)[None, :] + rm[:, None]) % 3 == 0, x, 0.0), y, sums)
        elif KIND == "scale":  # as a gain is
            sums = tl.dot((x.to(tl.float32) * 0.5).to(tl.bfloat16), y, sums)
        else:  # float32 by a high part and a rest
            high = x.to(tl.bfloat16)
            sums = tl.dot((x - high.to(tl.float32)).to(tl.bfloat16), y, tl.dot(high, y, sums))
    tl.store(c + rm[:, None] * n + rn[None, :], sums)
