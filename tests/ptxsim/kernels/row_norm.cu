// ‖w + scale · b a‖ of each row, DoRA's norm: a warp a row, its lanes along the depth, a sum by shuffles.
#include <cuda_fp16.h>

#include <cstdint>

constexpr int R = 16, WARPS = 4;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    row_norm(const __half* w, const __half* a, const __half* b, float* norm, int n, int k, float scale) {
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= n) return;
  float of_b[R];
  for (int r = 0; r < R; r++) of_b[r] = __half2float(b[row * R + r]);
  float squares = 0;
  for (int i = lane; i < k; i += 32) {
    float delta = 0;
    for (int r = 0; r < R; r++) delta += of_b[r] * __half2float(a[r * k + i]);
    const float adapted = __half2float(w[int64_t(row) * k + i]) + scale * delta;
    squares += adapted * adapted;
  }
  for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xffffffff, squares, step);
  if (lane == 0) norm[row] = sqrtf(squares);
}
