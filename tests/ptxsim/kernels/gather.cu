// Each token's h = x a[which]ᵀ, a block a token, a warp a rank; zeros for an adapter that is not there, as -1.
#include <cuda_fp16.h>

#include <cstdint>

constexpr int R = 16, WARPS = 4;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    gather(const __half* x, const __half* a, const int64_t* which, float* h, int k, int adapters) {
  const int token = blockIdx.x, lane = threadIdx.x % 32;
  const int64_t adapter = which[token];
  const bool there = adapter >= 0 && adapter < adapters;
  for (int rank = threadIdx.x / 32; rank < R; rank += WARPS) {
    float sum = 0;
    if (there) {
      const __half* row = a + (adapter * R + rank) * k;
      for (int i = lane; i < k; i += 32) sum += __half2float(x[int64_t(token) * k + i]) * __half2float(row[i]);
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (lane == 0) h[token * R + rank] = sum;
  }
}
