"""Planted bugs, and what sees each of them; `python -m tests.ptxsim.bugs` writes BUGS.md from this
table.

Each is one text exchanged for another, in the source of a kernel or in the PTX that Triton made of
it. The verdicts are those of corpus.judge; test_bugs.py runs every tool on every bug and compares,
so that none is claimed and none forgotten.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.ptxsim.corpus import CASES, COUNTER, FINDING, MISSED, VALUES

NONE = "–"  # not for this tool: the plain and the mended interpreter run Triton's source alone


@dataclass(frozen=True)
class Bug:
    case: str
    what: str
    old: str
    new: str
    simulator: str
    says: str
    """Part of what the simulator says first."""
    plain: str = NONE
    mended: str = NONE
    nth: int | None = None
    """In the PTX instead of the source: the match of the expression `old` that is exchanged."""

    @property
    def kernel(self) -> str:
        return self.case + (", PTX" if self.nth is not None else "")

    @property
    def interpreted(self) -> bool:
        return CASES[self.case].interpreted and self.nth is None

    def changed(self, ptx: str) -> str:
        found = list(re.finditer(self.old, ptx))
        if self.nth is None or not found:
            raise ValueError(f"{self.what}: the PTX has no {self.old}")
        return ptx[: found[self.nth].start()] + found[self.nth].expand(self.new) + ptx[found[self.nth].end() :]


def triton(case: str, what: str, old: str, new: str, plain: str, mended: str, simulator: str, says: str) -> Bug:
    return Bug(case, what, old, new, simulator, says, plain, mended)


def ptx(case: str, what: str, old: str, new: str, nth: int, simulator: str, says: str) -> Bug:
    return Bug(case, what, old, new, simulator, says, nth=nth)


WRONG, ORDER = "wrong numbers", "other bits in another order"
NO_FENCE, A_WRITTEN = "no fence.proxy.async after the write of", "a register of A of wgmma.mma_async is written before"
OF_A = r"(wgmma\.mma_async\S*\s+\{[^}]*\},\s*\{\s*(%r\d+)[^;]*;)"
BUGS = [
    triton("vector_add", "a store without its mask",
           "tl.store(y + at, xs + zs, mask=inside)", "tl.store(y + at, xs + zs)",
           MISSED, FINDING, FINDING, "st: out of bounds, vector_add_param_2+3988 of 3988 bytes"),
    triton("vector_add", "a load without its mask, of values that are not stored",
           "tl.load(x + at, mask=inside)", "tl.load(x + at)",
           MISSED, FINDING, FINDING, "ld: out of bounds, vector_add_param_0+3988 of 3988 bytes"),
    triton("vector_add", "a mask that is off by one", "inside = at < n", "inside = at <= n",
           MISSED, FINDING, FINDING, "ld: out of bounds, vector_add_param_0+3988 of 3988 bytes"),
    triton("vector_add", "blocks that overlap", "tl.program_id(0) * B", "tl.program_id(0) * (B - 2)",
           MISSED, FINDING, FINDING, "st: race on vector_add_param_2"),
    triton("vector_add", "an input written too",
           "tl.store(y + at, xs + zs, mask=inside)",
           "tl.store(y + at, xs + zs, mask=inside)\n    tl.store(z + at, xs + zs, mask=inside)",
           MISSED, FINDING, FINDING, "st: writes vector_add_param_1, which is read only"),
    triton("vector_add", "the next block's result read instead of its input", "tl.load(z + at, mask=inside)",
           "tl.load(z + at, mask=inside) + 0 * tl.load(y + at + B, mask=at + B < n)",
           VALUES, FINDING, FINDING, "which nobody wrote"),
    triton("vector_add", "neighbours of a warp far from each other in memory", "+ tl.arange(0, B)",
           "+ tl.arange(0, B) % 16 * (B // 16) + tl.arange(0, B) // 16",
           MISSED, MISSED, COUNTER, "sectors loaded, 250 are enough"),
    triton("lora", "a wrong stride", "x + rows[:, None] * k", "x + rows[:, None] * n",
           VALUES, VALUES, VALUES, WRONG),
    triton("lora", "x's rows not masked", "of_x, of_w = (rows < m)[:, None] & inside[None, :]", "of_x, of_w = inside[None, :]",
           MISSED, FINDING, FINDING, "cp.async: out of bounds, lora_param_0"),
    triton("lora", "the depth not masked, so that the next row is read", "inside = first + depth < k",
           "inside = first + depth < k + BK", VALUES, FINDING, FINDING, "cp.async: out of bounds, lora_param_"),
    triton("lora", "w's depth not masked, times zeros of x", "(columns < n)[:, None] & inside[None, :]",
           "(columns < n)[:, None] & (depth >= 0)[None, :]", MISSED, FINDING, FINDING, "cp.async: out of bounds, lora_param_1"),
    triton("lora", "a's padded rank not masked: NaN", "(ranks < r)[:, None] & inside[None, :]",
           "(ranks < R)[:, None] & inside[None, :]", VALUES, VALUES, VALUES, WRONG),
    triton("lora", "b's padded rank not masked", "(columns < n)[:, None] & (ranks < r)[None, :]",
           "(columns < n)[:, None] & (ranks < R)[None, :]", MISSED, FINDING, FINDING, "ld: out of bounds, lora_param_3"),
    triton("lora", "scale forgotten", "(h * scale)", "h", VALUES, VALUES, VALUES, WRONG),
    triton("lora", "h of the last tile alone", "tl.dot(xs, tl.trans(as_), h)", "tl.dot(xs, tl.trans(as_))",
           VALUES, VALUES, VALUES, WRONG),
    triton("lora", "h scaled in each step of the depth",
           "h = tl.dot(xs, tl.trans(as_), h)", "h = tl.dot(xs, tl.trans(as_), h) * scale", VALUES, VALUES, VALUES, WRONG),
    triton("lora", "w read twice", "sums = tl.dot(xs, tl.trans(ws), sums)",
           "again = tl.load(w + columns[:, None] * k + first + depth[None, :], mask=of_w, other=0.0, volatile=True)\n"
           "        ws = tl.maximum(ws, again)\n        sums = tl.dot(xs, tl.trans(ws), sums)",
           MISSED, MISSED, COUNTER, "sectors loaded, 2040 are enough"),
    triton("row_norm", "s forgotten", "scale * tl.dot(bs, as_)", "tl.dot(bs, as_)", VALUES, VALUES, VALUES, WRONG),
    triton("row_norm", "a sum over the wrong axis", "tl.sum(adapted * adapted, 1)", "tl.sum(adapted * adapted, 0)",
           VALUES, VALUES, VALUES, WRONG),
    triton("row_norm", "b a rounded to float16", "scale * tl.dot(bs, as_)", "scale * tl.dot(bs, as_).to(tl.float16)",
           VALUES, VALUES, VALUES, WRONG),
    triton("row_norm", "b's rows not masked", "mask=(rows < n)[:, None], other=0.0)", "mask=(rows >= 0)[:, None], other=0.0)",
           MISSED, FINDING, FINDING, "ld: out of bounds, row_norm_param_2"),
    triton("dot", "TF32 where float32 is wanted", "input_precision=PRECISION", 'input_precision="tf32"',
           MISSED, VALUES, VALUES, WRONG),
    triton("dot", "operands rounded to float16", "tl.dot(xs, ws, sums", "tl.dot(xs.to(tl.float16), ws.to(tl.float16), sums",
           VALUES, VALUES, VALUES, WRONG),
    triton("dot", "sums rounded to float16 in each step", "input_precision=PRECISION)",
           "input_precision=PRECISION).to(tl.float16).to(tl.float32)", VALUES, VALUES, VALUES, WRONG),
    triton("dot", "sums set back in each step", "sums = tl.dot(xs, ws, sums,", "sums = tl.dot(xs, ws,",
           VALUES, VALUES, VALUES, WRONG),
    triton("split_k", "a plain addition instead of an atomic", 'tl.atomic_add(at, sums, sem="relaxed")',
           "tl.store(at, tl.load(at) + sums)", MISSED, FINDING, FINDING, "race on split_k_param_2"),
    triton("split_k_ticket", "a ticket that passes nothing on", 'tl.atomic_add(tile, 1, sem="acq_rel")',
           'tl.atomic_add(tile, 1, sem="relaxed")', MISSED, FINDING, FINDING, "ld: race on split_k_ticket_param_3"),
    triton("split_k_ticket", "the last but one adds the parts", "== PARTS - 1", "== PARTS - 2",
           VALUES, FINDING, FINDING, "ld: race on split_k_ticket_param_3"),
    triton("split_k_ticket", "a part without work leaves its scratch memory unwritten", "    tl.store(parts",
           "    if part * B < k:\n        tl.store(parts", VALUES, VALUES, FINDING, "which nobody wrote"),
    triton("split_k_ticket", "the counter not set back for the next launch",
           '        tl.atomic_xchg(tile, 0, sem="relaxed")\n', "", VALUES, VALUES, VALUES, WRONG),
    triton("split_k_ticket", "parts added from the own one on: an order that depends on who comes last",
           "parts + other * m * n", "parts + (part + other) % PARTS * m * n", MISSED, VALUES, VALUES, ORDER),
    triton("gather", "an adapter of -1 not told apart", "if adapter >= 0:", "if adapter >= -1:",
           VALUES, FINDING, FINDING, "ld: out of bounds, gather_param_1-"),
    triton("gather", "a's depth not masked, times zeros of x", "mask=(depth < k)[None, :]", "mask=(depth < k + BK)[None, :]",
           MISSED, FINDING, FINDING, "ld: out of bounds, gather_param_1+19200 of 19200 bytes"),
    triton("gather, 2³¹ elements", "an offset in 32 bits", "a + adapter * R * k", "a + adapter.to(tl.int32) * R * k",
           VALUES, FINDING, FINDING, "ld: out of bounds, gather_param_1-"),
    triton("dropout_rows", "one mask for all rows", "zero + row.to(tl.uint32)", "zero", VALUES, VALUES, VALUES, WRONG),
    triton("dropout_rows", "one word of four drawn used for all", "word = row * columns + column, column < columns, column % 4",
           "word = row * columns + column, column < columns, column * 0", VALUES, VALUES, VALUES, WRONG),
    triton("dropout_rows", "half of the seed dropped", "tl.philox(seed,", "tl.philox(seed & 0xFFFFFFFF,",
           VALUES, VALUES, VALUES, WRONG),
    triton("dropout_rows", "what is kept not scaled", "xs * kept", "xs", VALUES, VALUES, VALUES, WRONG),
    triton("softmax", "the maximum not subtracted", "row - tl.max(row, 0)", "row", VALUES, VALUES, VALUES, WRONG),
    triton("softmax", "zeros in the padding", 'other=float("-inf")', "other=0.0", VALUES, VALUES, VALUES, WRONG),
    triton("softmax", "two programs write one row", "(y + tl.program_id(0) * n", "(y + tl.program_id(0) // 2 * n",
           VALUES, FINDING, FINDING, "st: race on softmax_param_1"),
    triton("through_memory", "no barrier between a store and another thread's load", "if BARRIER:", "if not BARRIER:",
           MISSED, MISSED, FINDING, "which nobody wrote"),
    ptx("lora", "one bar.sync gone", r"bar\.sync\s+0;", "", 1, FINDING, "not been waited for"),
    ptx("lora", "cp.async.wait_group too weak", r"wait_group\s+3;", "wait_group 6;", 0, FINDING, "not been waited for"),
    ptx("lora", "cp.async.wait_group gone", r"cp\.async\.wait_group\s+3;", "", 0, FINDING, "not been waited for"),
    ptx("lora", "no cp.async.commit_group", r"cp\.async\.commit_group;", "", 2, FINDING, "not been waited for"),
    ptx("lora", "a store without its predicate", r"@%p\d+ (st\.global)", r"\1", -1, FINDING, "st: out of bounds, lora_param_4"),
    ptx("lora", "ldmatrix of another row", r"\[(%r\d+)\+4608\]", r"[\1+4096]", 0, VALUES, WRONG),
    ptx("row_norm", "ldmatrix without .trans", r"x4\.trans", "x4", 0, VALUES, WRONG),
    ptx("softmax", "a shuffle with the wrong lane", r"(shfl.*), 8, 31", r"\1, 4, 31", 0, FINDING, "shared race with a write"),
    ptx("softmax", "a shuffle that not all lanes of its mask reach", r"(shfl)(.*, 16, 31)", r"@%p2 \1\2", 0,
        FINDING, "shfl: lanes of its member mask are not here"),
    ptx("split_k_ticket", "no barrier between the parts and the ticket", r"bar\.sync\s+0;((?:(?!bar)[\s\S])*acq_rel)", r"\1", 0,
        FINDING, "ld: race on split_k_ticket_param_3"),
    ptx("split_k_ticket", "an atomic that is relaxed", r"gpu\.acq_rel", "gpu.relaxed", 0,
        FINDING, "ld: race on split_k_ticket_param_3"),
    Bug("vector_add.cu", "four numbers where fewer are left", "if (first + 4 <= n)", "if (first < n)",
        FINDING, "ld: out of bounds, vector_add_param_"),
    Bug("vector_add.cu", "vectors that do not begin at 16 bytes", "threadIdx.x) * 4;", "threadIdx.x) * 4 + 1;",
        FINDING, "ld: misaligned address, vector_add_param_"),
    Bug("vector_add.cu", "what is left over forgotten", "i < n; i++", "i + 4 < n; i++", VALUES, WRONG),
    Bug("matmul.cu", "no barrier after the wait", "    __syncthreads();  // all have waited for theirs\n", "",
        FINDING, "reads shared memory that nobody wrote"),
    Bug("matmul.cu", "a warp's barrier instead of the block's", "__syncthreads();  // all have waited", "__syncwarp();  //",
        FINDING, "reads shared memory that nobody wrote"),
    Bug("matmul.cu", "a barrier in a branch", "__syncthreads();  // all have waited",
        "if (threadIdx.x % 32 < 24) __syncthreads();  //", FINDING, "bar: not all lanes of the warp are here"),
    Bug("matmul.cu", "a wait that is too weak", "wait<1>();", "wait<2>();", FINDING, "not been waited for"),
    Bug("matmul.cu", "no commit in the loop", "    commit();  // the next\n", "", FINDING, "not been waited for"),
    Bug("matmul.cu", "no barrier before a stage is filled again", "    __syncthreads();  // all have read before it is", "//",
        FINDING, "shared race with a read"),
    Bug("matmul.cu", "rows not masked", "first + row < rows && k + column * 8 < depth", "k + column * 8 < depth",
        FINDING, "cp.async: out of bounds, matmul_param_"),
    Bug("matmul.cu", "a depth mask that is off by one", "k + column * 8 < depth", "k + column * 8 <= depth",
        FINDING, "cp.async: out of bounds, matmul_param_"),
    Bug("matmul.cu", "no zeros beyond the edges", "copy16(piece(tile, row, column), from, inside ? 16 : 0)",
        "if (inside) copy16(piece(tile, row, column), from, 16)", FINDING, "reads shared memory that nobody wrote"),
    Bug("matmul.cu", "ldmatrix of another row", "lane % 16, kk", "lane / 2 % 16, kk", VALUES, WRONG),
    Bug("matmul.cu", "rows of one column in one bank", "(column ^ (row / 2 % 4)) * 8", "column * 8", COUNTER,
        "passes of shared memory"),
    Bug("matmul.cu", "blocks that overlap", "column0 = blockIdx.x * BN", "column0 = blockIdx.x * (BN - 8)",
        FINDING, "race on matmul_param_2"),
    Bug("lora.cu", "h of the last step alone", "if (s < 0) continue;",
        "if (s < 0) continue;\n    for (int i = 0; i < 8; i++) h[i / 4][i % 4] = 0;", VALUES, WRONG),
    Bug("lora.cu", "half of h not scaled", "scale * h[i / 2][i % 2 * 2 + 1]", "h[i / 2][i % 2 * 2 + 1]", VALUES, WRONG),
    Bug("lora.cu", "b's rank not masked", "column0 + row < n && rank < r", "column0 + row < n",
        FINDING, "ld: out of bounds, lora_param_3"),
    Bug("lora.cu", "b's rows not masked", "column0 + row < n && rank < r", "rank < r",
        FINDING, "ld: out of bounds, lora_param_3"),
    Bug("lora.cu", "a's padded rank not masked: NaN", "a, 0, r,", "a, 0, R,", VALUES, WRONG),
    Bug("lora.cu", "b's halves of eight ranks exchanged", "lane % 8, lane / 8 % 2)", "lane % 8, 1 - lane / 8 % 2)",
        VALUES, WRONG),
    Bug("row_norm.cu", "s forgotten", "scale * delta", "delta", VALUES, WRONG),
    Bug("row_norm.cu", "a reduction that begins too low", "step = 16;", "step = 8;", VALUES, WRONG),
    Bug("row_norm.cu", "a shuffle in a branch", "squares += __shfl_xor_sync", "if (lane < 16) squares += __shfl_xor_sync",
        FINDING, "shfl: reads lane 16, which is not here"),
    Bug("row_norm.cu", "a shuffle whose mask leaves out half of its lanes", "__shfl_xor_sync(0xffffffff,",
        "__shfl_xor_sync(0xffff,", FINDING, "shfl: a lane is not in its own member mask"),
    Bug("row_norm.cu", "warps beyond the last row", "if (row >= n) return;", "", FINDING, "ld: out of bounds, row_norm_param_"),
    Bug("row_norm.cu", "lanes far from each other in memory", "int i = lane; i < k; i += 32",
        "int i = lane * 3; i < min(k, lane * 3 + 3); i++", COUNTER, "sectors loaded"),
    Bug("split_k.cu", "a plain addition instead of an atomic", "atomicAdd(y + int64_t(row) * n + column, sum)",
        "y[int64_t(row) * n + column] += sum", FINDING, "race on split_k_param_2"),
    Bug("split_k.cu", "parts that overlap by one", "min(first + each, k)", "min(first + each + 1, k)", VALUES, WRONG),
    Bug("split_k.cu", "the last part not cut off", "min(first + each, k)", "first + each",
        FINDING, "ld: out of bounds, split_k_param_"),
    Bug("split_k.cu, ticket", "no fence before the ticket", "  __threadfence();  // before the ticket\n", "",
        FINDING, "ld: race on ticket_param_3"),
    Bug("split_k.cu, ticket", "no fence after the ticket", "  __threadfence();  // after the ticket\n", "",
        FINDING, "ld: race on ticket_param_3"),
    Bug("split_k.cu, ticket", "no barrier before the ticket", "  __syncthreads();  // all have left their part\n", "",
        FINDING, "ld: race on ticket_param_3"),
    Bug("split_k.cu, ticket", "no barrier after the ticket", "  __syncthreads();  // all know\n", "",
        FINDING, "reads shared memory that nobody wrote"),
    Bug("split_k.cu, ticket", "the ticket counted without an atomic", "atomicAdd(counter + tile, 1)", "counter[tile]++",
        FINDING, "ld: race on ticket_param_4"),
    Bug("split_k.cu, ticket", "the counter not set back for the next launch", "counter[tile] = 0", "", VALUES, WRONG),
    Bug("gather.cu", "an adapter of -1 not told apart", "adapter >= 0 && adapter < adapters", "adapter < adapters",
        FINDING, "ld: out of bounds, gather_param_1-"),
    Bug("gather.cu", "an adapter that is not there", "adapter >= 0 && adapter < adapters", "adapter >= 0",
        FINDING, "ld: out of bounds, gather_param_"),
    Bug("gather.cu", "64-bit adapters read as 32-bit", "which[token]", "reinterpret_cast<const int*>(which)[token]",
        VALUES, WRONG),
    Bug("gather.cu", "nothing written for a token without adapter", "    float sum = 0;",
        "    if (!there) return;\n    float sum = 0;", VALUES, WRONG),
    Bug("gather.cu, 2³¹ elements", "an offset in 32 bits", "(adapter * R + rank) * k", "int(adapter * R + rank) * k",
        FINDING, "ld: out of bounds, gather_param_1-"),
    Bug("dropout.cu", "one mask for all rows", "uint32_t(row), 0, 0}", "0, 0, 0}", VALUES, WRONG),
    Bug("dropout.cu", "nine rounds", "round < 10", "round < 9", VALUES, WRONG),
    Bug("dropout.cu", "the same key in each round", "k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;", "", VALUES, WRONG),
    Bug("dropout.cu", "columns written beyond the row", "i < 4 && group * 4 + i < columns", "i < 4",
        FINDING, "st: race on dropout_param_1"),
    ptx("lora, sm_90", "no fence between cp.async and wgmma", r"fence\.proxy\.async[.\w:]*;", "", 0, FINDING, NO_FENCE),
    ptx("lora, sm_90", "no fence between st.shared and wgmma", r"fence\.proxy\.async[.\w:]*;", "", -1, FINDING, NO_FENCE),
    ptx("lora, sm_90", "a fence for global memory alone", r"(fence\.proxy\.async)[.\w:]*;", r"\1.global;", 0,
        FINDING, NO_FENCE),
    ptx("lora, sm_90", "wgmma.wait_group gone", r"wgmma\.wait_group\S*\s+0;", "", -1,
        FINDING, "an accumulator of wgmma.mma_async is used before"),
    ptx("cast_dot, sm_90", "a register of wgmma's A written before the wait", OF_A, r"\1 mov.b32 \2, 0;", -1,
        FINDING, A_WRITTEN),
    ptx("cast_dot, sm_90", "that register loaded, of some lanes", OF_A, r"\1 @%p1 ld.shared.b32 \2, [global_smem];", 0,
        FINDING, A_WRITTEN),
    ptx("handed_on, sm_90", "no wait for the launch before", r"griddepcontrol\.wait;", "", 0, FINDING, "of the launch before"),
    triton("handed_on, sm_90", "that wait after what it is for", "    tl.extra.cuda.gdc_wait()\n    tl.store(y +",
           "    early = tl.load(held + at, mask=inside)\n    tl.extra.cuda.gdc_wait()\n    xs += early\n    tl.store(y +",
           NONE, NONE, FINDING, "ld reads handed_on_param_1+"),
    triton("handed_on, sm_90", "y written before the wait", "    tl.extra.cuda.gdc_wait()\n",
           "    tl.store(y + at, xs, mask=inside)\n    tl.extra.cuda.gdc_wait()\n",
           NONE, NONE, FINDING, "st writes handed_on_param_2+"),
    Bug("wgmma.cu", "no fence between what threads copied and wgmma", "    fence_proxy();  // shows", "//", FINDING, NO_FENCE),
    Bug("wgmma.cu", "that fence for global memory alone", "fence.proxy.async.shared::cta;", "fence.proxy.async.global;",
        FINDING, NO_FENCE),
    Bug("wgmma.cu", "that fence before the copies are waited for", "    wait<1>();\n    fence_proxy();  // shows",
        "    fence_proxy();\n    wait<1>();  //", FINDING, "wgmma A at"),
    Bug("wgmma.cu", "that fence in the first warp alone", "    fence_proxy();  // shows",
        "    if (warp == 0) fence_proxy();  //", FINDING, NO_FENCE),
    Bug("wgmma.cu", "that fence after wgmma has begun",
        "    fence_proxy();  // shows both to wgmma\n    __syncthreads();\n    multiply(sum, xs[now], ws[now]);",
        "    __syncthreads();\n    multiply(sum, xs[now], ws[now]);\n    fence_proxy();", FINDING, NO_FENCE),
    Bug("wgmma.cu", "a stage filled while wgmma reads it", "    asm volatile(\"wgmma.wait_group.sync.aligned 0",
        "    if (s == 1 || s + 1 == steps) asm volatile(\"wgmma.wait_group.sync.aligned 0",
        FINDING, "a wgmma that reads it has not been waited for"),
    Bug("softmax.cu", "the maximum not subtracted", "v[j] - most", "v[j]", VALUES, WRONG),
    Bug("softmax.cu", "zeros in the padding", "__half2float(x[i]) : -INFINITY", "__half2float(x[i]) : 0.f", VALUES, WRONG),
    Bug("softmax.cu", "no barrier in the reduction", "  __syncthreads();  // all warps have left theirs\n", "",
        FINDING, "shared race with a write"),
    Bug("softmax.cu", "both reductions through one buffer", "of_warps[1], []", "of_warps[0], []",
        FINDING, "shared race with a read"),
    Bug("softmax.cu", "half of the warps leave nothing", "threadIdx.x % 32 == 0", "threadIdx.x % 64 == 0",
        FINDING, "reads shared memory that nobody wrote"),
    Bug("softmax.cu", "a row read twice", "__expf(v[j] - most)",
        "__expf((j * THREADS + threadIdx.x < n ? __half2float(x[j * THREADS + threadIdx.x]) : -INFINITY) - most)",
        COUNTER, "sectors loaded, 77 are enough"),
]  # fmt: skip


HEAD = """# Planted bugs

{} bugs and what sees them. Written by `python -m tests.ptxsim.bugs`; `test_bugs.py` runs every tool on every bug.

* **finding**: the tool names what is wrong. **values**: the numbers differ from those of float64, or the bits from those of
  another order of blocks, and nothing else is said. **counter**: the numbers are right, but there are more sectors or bank
  conflicts than the kernel needs. **–**: the tool does not run what holds the bug.
* The plain interpreter is Triton's own, the mended one `lora_kernels.testing.triton_interpreter`. To be fair to the plain
  one the numbers are float16 and float32, for it multiplies the bit patterns of bfloat16, and tensors lie among random
  numbers, so that what is read beside them shows where it reaches the result.
* A bug in the PTX is one line changed of what Triton made of the kernel.

"""


def table() -> str:
    lines = ["| tool | finding | values | counter | missed | bugs it runs |", "|---|---|---|---|---|---|"]
    for tool in ("plain", "mended", "simulator"):
        found = [getattr(bug, tool) for bug in BUGS if getattr(bug, tool) != NONE]
        counts = [found.count(verdict) for verdict in (FINDING, VALUES, COUNTER, MISSED)]
        name = tool if tool == "simulator" else f"{tool} interpreter"
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {len(found)} |")
    columns = ("bug", "kernel", "plain interpreter", "mended interpreter", "simulator", "what the simulator says")
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for bug in BUGS:
        lines.append(f"| {bug.what} | {bug.kernel} | {bug.plain} | {bug.mended} | {bug.simulator} | {bug.says} |")
    return HEAD.format(len(BUGS)) + "\n".join(lines) + "\n"


PAGE = Path(__file__).parent / "BUGS.md"

if __name__ == "__main__":
    PAGE.write_text(table())
