// y = x wᵀ in bf16 on tensor cores, to try the simulator on what nvcc makes of it: cp.async in two stages, a swizzled
// tile, ldmatrix, mma, ragged edges. Each BUG_… plants one mistake that kernels really have.
//   nvcc -ptx -arch=sm_80 -O3 matmul.cu
#include <cuda_bf16.h>

#include <cstdint>

constexpr int BM = 64, BN = 64, BK = 32, STAGES = 2, THREADS = 128;

__device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
__device__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a tile of 64 rows of 32 numbers: 4 pieces of 16 bytes a row, exchanged so that 8 rows of one column differ in banks
using Tile = __nv_bfloat16[BM][BK];
__device__ __nv_bfloat16* piece(Tile& tile, int row, int column) {
#ifdef BUG_NO_SWIZZLE
  return &tile[row][column * 8];
#else
  return &tile[row][(column ^ (row / 2 % 4)) * 8];
#endif
}

__device__ void load_tile(Tile& tile, const __nv_bfloat16* m, int first, int rows, int k, int depth) {
#ifdef BUG_COPY_LOOP
  // nvcc does not unroll this one, for it does not know where it begins
  for (int i = threadIdx.x; i < BM * BK / 8; i += THREADS) {
#else
  for (int part = 0; part < BM * BK / 8 / THREADS; part++) {
    const int i = part * THREADS + threadIdx.x;
#endif
    const int row = i / 4, column = i % 4;
#ifdef BUG_NO_ROW_MASK
    const bool inside = k + column * 8 < depth;
#elif defined(BUG_COLUMN_MASK)
    const bool inside = first + row < rows && k + column * 8 <= depth;
#else
    const bool inside = first + row < rows && k + column * 8 < depth;
#endif
    const __nv_bfloat16* from = inside ? m + int64_t(first + row) * depth + k + column * 8 : m;
#ifdef BUG_NO_ZERO_FILL
    if (inside) copy16(piece(tile, row, column), from, 16);
#else
    copy16(piece(tile, row, column), from, inside ? 16 : 0);
#endif
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    matmul(const __nv_bfloat16* x, const __nv_bfloat16* w, __nv_bfloat16* y, int m, int n, int k) {
  __shared__ alignas(128) Tile xs[STAGES], ws[STAGES];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = blockIdx.y * BM;
#ifdef BUG_BLOCKS_OVERLAP
  const int column0 = blockIdx.x * (BN - 8);
#else
  const int column0 = blockIdx.x * BN;
#endif
  float sum[BN / 8][4] = {};
  const int steps = (k + BK - 1) / BK;
  load_tile(xs[0], x, row0, m, 0, k);
  load_tile(ws[0], w, column0, n, 0, k);
  commit();
  for (int s = 0; s < steps; s++) {
    const int now = s % STAGES, next = (s + 1) % STAGES;
    if (s + 1 < steps) {
      load_tile(xs[next], x, row0, m, (s + 1) * BK, k);
      load_tile(ws[next], w, column0, n, (s + 1) * BK, k);
    }
    commit();
#ifdef BUG_WAIT_TOO_WEAK
    wait<2>();
#else
    wait<1>();
#endif
#ifdef BUG_DIVERGENT_BARRIER
    if (threadIdx.x % 32 < 24) __syncthreads();
#elif defined(BUG_SYNCWARP)
    __syncwarp();
#elif !defined(BUG_NO_BARRIER)
    __syncthreads();
#endif
    for (int kk = 0; kk < BK / 16; kk++) {
      uint32_t a[4];
#ifdef BUG_WRONG_ROW
      ldmatrix(a, piece(xs[now], warp * 16 + lane / 2 % 16, kk * 2 + lane / 16));
#else
      ldmatrix(a, piece(xs[now], warp * 16 + lane % 16, kk * 2 + lane / 16));
#endif
      for (int j = 0; j < BN / 16; j++) {
        uint32_t b[4];
        ldmatrix(b, piece(ws[now], j * 16 + lane / 16 * 8 + lane % 8, kk * 2 + lane / 8 % 2));
        mma(sum[2 * j], a, b[0], b[1]);
        mma(sum[2 * j + 1], a, b[2], b[3]);
      }
    }
#ifndef BUG_NO_BARRIER_BEFORE_REFILL
    __syncthreads();
#endif
  }
  for (int j = 0; j < BN / 8; j++) {
    for (int half = 0; half < 2; half++) {
      const int row = row0 + warp * 16 + lane / 4 + half * 8, column = column0 + j * 8 + lane % 4 * 2;
      if (row < m && column < n) {
        *reinterpret_cast<__nv_bfloat162*>(y + int64_t(row) * n + column) =
            __floats2bfloat162_rn(sum[j][2 * half], sum[j][2 * half + 1]);
      }
    }
  }
}
