// y = x wᵀ on tensor cores: cp.async in two stages, a swizzled tile, ldmatrix, mma, ragged edges.
#include "ptx.cuh"

constexpr int BM = 64, BN = 64, STAGES = 2, THREADS = 128;

extern "C" __global__ void __launch_bounds__(THREADS)
    matmul(const Element* x, const Element* w, Element* y, int m, int n, int k) {
  __shared__ alignas(128) Tile<BM> xs[STAGES];
  __shared__ alignas(128) Tile<BN> ws[STAGES];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = blockIdx.y * BM, column0 = blockIdx.x * BN;
  float sum[BN / 8][4] = {};
  const int steps = (k + BK - 1) / BK;
  load_tile<BM, THREADS>(xs[0], x, row0, m, 0, k);
  load_tile<BN, THREADS>(ws[0], w, column0, n, 0, k);
  commit();  // the first
  for (int s = 0; s < steps; s++) {
    const int now = s % STAGES, next = (s + 1) % STAGES;
    if (s + 1 < steps) {
      load_tile<BM, THREADS>(xs[next], x, row0, m, (s + 1) * BK, k);
      load_tile<BN, THREADS>(ws[next], w, column0, n, (s + 1) * BK, k);
    }
    commit();  // the next
    wait<1>();
    __syncthreads();  // all have waited for theirs
    for (int kk = 0; kk < BK / 16; kk++) {
      uint32_t a[4];
      ldmatrix(a, piece(xs[now], warp * 16 + lane % 16, kk * 2 + lane / 16));
      for (int j = 0; j < BN / 16; j++) {
        uint32_t b[4];
        ldmatrix(b, piece(ws[now], j * 16 + lane / 16 * 8 + lane % 8, kk * 2 + lane / 8 % 2));
        mma(sum[2 * j], a, b[0], b[1]);
        mma(sum[2 * j + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();  // all have read before it is filled again
  }
  for (int j = 0; j < BN / 8; j++) {
    for (int half = 0; half < 2; half++) {
      const int row = row0 + warp * 16 + lane / 4 + half * 8, column = column0 + j * 8 + lane % 4 * 2;
      if (row < m && column < n) {
        *reinterpret_cast<Pair*>(y + int64_t(row) * n + column) = narrow(sum[j][2 * half], sum[j][2 * half + 1]);
      }
    }
  }
}
