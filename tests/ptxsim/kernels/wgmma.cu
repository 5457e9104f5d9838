// y = x wᵀ by warp groups of sm_90: x comes by cp.async in two stages, w through registers, both without a swizzle.
#include "ptx.cuh"

constexpr int BM = 64, BN = 64, DEPTH = 64, STAGES = 2, THREADS = 128, CORES = DEPTH / 8;
// 8 rows of 16 bytes lie together; then follow those of the next rows, then those of the next 8 columns
constexpr int NEXT_ROWS = 128, NEXT_COLUMNS = BM / 8 * NEXT_ROWS;
using Operand = Element[BM * DEPTH];

__device__ Element* core_row(Element* tile, int row, int core) {
  return tile + (core * NEXT_COLUMNS + row / 8 * NEXT_ROWS + row % 8 * 16) / 2;
}
__device__ uint64_t descriptor(const Element* tile, int core) {
  const uint64_t start = shared_address(tile) + core * NEXT_COLUMNS;
  return start / 16 | uint64_t(NEXT_COLUMNS / 16) << 16 | uint64_t(NEXT_ROWS / 16) << 32;
}

// f(row, core, the address in `m` or null beyond its edges) for this thread's pieces of a tile
template <typename F>
__device__ void each_piece(const Element* m, int first, int rows, int k, int depth, F&& f) {
  for (int i = threadIdx.x; i < BM * CORES; i += THREADS) {
    const int row = i % BM, core = i / BM;  // neighbours lie in 8 rows of one column: no bank twice
    const bool inside = first + row < rows && k + core * 8 < depth;
    f(row, core, inside ? m + int64_t(first + row) * depth + k + core * 8 : nullptr);
  }
}
__device__ void copy_tile(Element* tile, const Element* m, int first, int rows, int k, int depth) {
  each_piece(m, first, rows, k, depth, [&](int row, int core, const Element* from) {
    copy16(core_row(tile, row, core), from ? from : m, from ? 16 : 0);
  });
}
__device__ void store_tile(Element* tile, const Element* m, int first, int rows, int k, int depth) {
  each_piece(m, first, rows, k, depth, [&](int row, int core, const Element* from) {
    *reinterpret_cast<uint4*>(core_row(tile, row, core)) = from ? *reinterpret_cast<const uint4*>(from) : uint4{};
  });
}

__device__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define SUM(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
__device__ void wgmma(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." KIND "." KIND
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"
      : SUM(0), SUM(4), SUM(8), SUM(12), SUM(16), SUM(20), SUM(24), SUM(28)
      : "l"(a), "l"(b));
}

// issued, not waited for
__device__ void multiply(float (&sum)[32], const Element* x, const Element* w) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  for (int core = 0; core < CORES; core += 2) wgmma(sum, descriptor(x, core), descriptor(w, core));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS)
    wgmma_matmul(const Element* x, const Element* w, Element* y, int m, int n, int k) {
  __shared__ alignas(128) Operand xs[STAGES];
  __shared__ alignas(128) Operand ws[STAGES];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = blockIdx.y * BM, column0 = blockIdx.x * BN;
  float sum[32] = {};
  const int steps = (k + DEPTH - 1) / DEPTH;
  copy_tile(xs[0], x, row0, m, 0, k);
  commit();
  for (int s = 0; s < steps; s++) {
    const int now = s % STAGES, next = (s + 1) % STAGES;
    if (s + 1 < steps) copy_tile(xs[next], x, row0, m, (s + 1) * DEPTH, k);
    commit();
    store_tile(ws[now], w, column0, n, s * DEPTH, k);
    wait<1>();
    fence_proxy();  // shows both to wgmma
    __syncthreads();
    multiply(sum, xs[now], ws[now]);
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    __syncthreads();  // all have multiplied before it is filled again
  }
  for (int i = 0; i < 32; i += 2) {
    const int row = row0 + warp * 16 + lane / 4 + i / 2 % 2 * 8, column = column0 + i / 4 * 8 + lane % 4 * 2;
    if (row < m && column < n) *reinterpret_cast<Pair*>(y + int64_t(row) * n + column) = narrow(sum[i], sum[i + 1]);
  }
}
