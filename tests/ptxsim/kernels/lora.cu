// y = x wᵀ + scale · (x aᵀ) bᵀ, rank at most 16: h = x aᵀ in the same loop over the depth, b at its end, h never in memory.
#include "ptx.cuh"

constexpr int BM = 64, BN = 64, R = 16, STAGES = 2, THREADS = 128;

__device__ uint32_t packed(float v, float w) {
  const Pair pair = narrow(v, w);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    lora(const Element* x, const Element* w, const Element* a, const Element* b, Element* y, int m, int n, int k, int r,
         float scale) {
  __shared__ alignas(128) Tile<BM> xs[STAGES];
  __shared__ alignas(128) Tile<BN> ws[STAGES];
  __shared__ alignas(128) Tile<R> as[STAGES];
  __shared__ alignas(128) Tile<BN> bs;  // the first half of each row is used
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = blockIdx.y * BM, column0 = blockIdx.x * BN;
  float sum[BN / 8][4] = {}, h[2][4] = {};
  const int steps = (k + BK - 1) / BK;
  for (int i = threadIdx.x; i < BN * R; i += THREADS) {
    const int row = i / R, rank = i % R;
    const bool inside = column0 + row < n && rank < r;
    piece(bs, row, rank / 8)[rank % 8] = inside ? b[int64_t(column0 + row) * r + rank] : narrow(0.f);
  }
  for (int s = -1; s < steps; s++) {
    const int now = s % STAGES, next = (s + 1) % STAGES;
    if (s + 1 < steps) {
      load_tile<BM, THREADS>(xs[next], x, row0, m, (s + 1) * BK, k);
      load_tile<BN, THREADS>(ws[next], w, column0, n, (s + 1) * BK, k);
      load_tile<R, THREADS>(as[next], a, 0, r, (s + 1) * BK, k);
    }
    commit();
    if (s < 0) continue;
    wait<1>();
    __syncthreads();  // all have waited for theirs
    for (int kk = 0; kk < BK / 16; kk++) {
      uint32_t of_x[4], of_w[4];
      ldmatrix(of_x, piece(xs[now], warp * 16 + lane % 16, kk * 2 + lane / 16));
      const int row = lane / 16 * 8 + lane % 8, column = kk * 2 + lane / 8 % 2;
      for (int j = 0; j < BN / 16; j++) {
        ldmatrix(of_w, piece(ws[now], j * 16 + row, column));
        mma(sum[2 * j], of_x, of_w[0], of_w[1]);
        mma(sum[2 * j + 1], of_x, of_w[2], of_w[3]);
      }
      ldmatrix(of_w, piece(as[now], row, column));
      mma(h[0], of_x, of_w[0], of_w[1]);
      mma(h[1], of_x, of_w[2], of_w[3]);
    }
    __syncthreads();  // all have read before it is filled again
  }
  // where a lane holds its results of h is where it must hold them as a left operand
  uint32_t left[4];
  for (int i = 0; i < 4; i++) left[i] = packed(scale * h[i / 2][i % 2 * 2], scale * h[i / 2][i % 2 * 2 + 1]);
  for (int j = 0; j < BN / 16; j++) {
    uint32_t of_b[4];
    ldmatrix(of_b, piece(bs, j * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2));
    mma(sum[2 * j], left, of_b[0], of_b[1]);
    mma(sum[2 * j + 1], left, of_b[2], of_b[3]);
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
