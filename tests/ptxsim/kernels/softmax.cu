// Softmax of each row of at most 512 numbers: a block a row, the row in registers, reductions by shuffles and through
// shared memory.
#include <cuda_fp16.h>

#include <cstdint>

constexpr int THREADS = 128, WARPS = THREADS / 32, EACH = 4;

template <class F>
__device__ float reduced(float v, float (&of_warps)[WARPS], F combine) {
  for (int step = 16; step > 0; step /= 2) v = combine(v, __shfl_xor_sync(0xffffffff, v, step));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = v;
  __syncthreads();  // all warps have left theirs
  v = of_warps[0];
  for (int warp = 1; warp < WARPS; warp++) v = combine(v, of_warps[warp]);
  return v;
}

extern "C" __global__ void __launch_bounds__(THREADS) softmax(const __half* x, __half* y, int n) {
  __shared__ float of_warps[2][WARPS];
  x += int64_t(blockIdx.x) * n, y += int64_t(blockIdx.x) * n;
  float v[EACH], most = -INFINITY, sum = 0;
  for (int j = 0; j < EACH; j++) {
    const int i = j * THREADS + threadIdx.x;
    v[j] = i < n ? __half2float(x[i]) : -INFINITY;
    most = fmaxf(most, v[j]);
  }
  most = reduced(most, of_warps[0], [](float p, float q) { return fmaxf(p, q); });
  for (int j = 0; j < EACH; j++) {
    v[j] = __expf(v[j] - most);
    sum += v[j];
  }
  sum = reduced(sum, of_warps[1], [](float p, float q) { return p + q; });
  for (int j = 0; j < EACH; j++) {
    const int i = j * THREADS + threadIdx.x;
    if (i < n) y[i] = __float2half_rn(v[j] / sum);
  }
}
