// y = x wᵀ, the depth shared among gridDim.z blocks: by atomics, whose order is free, or by a ticket, always the same bits.
#include <cuda_fp16.h>

#include <cstdint>

constexpr int B = 16;

__device__ float part(const __half* x, const __half* w, int row, int column, int m, int n, int k) {
  const int each = (k + gridDim.z - 1) / gridDim.z, first = blockIdx.z * each, last = min(first + each, k);
  float sum = 0;
  if (row < m && column < n) {
    for (int i = first; i < last; i++) {
      sum += __half2float(x[int64_t(row) * k + i]) * __half2float(w[int64_t(column) * k + i]);
    }
  }
  return sum;
}

extern "C" __global__ void split_k(const __half* x, const __half* w, float* y, int m, int n, int k) {
  const int row = blockIdx.y * B + threadIdx.x / B, column = blockIdx.x * B + threadIdx.x % B;
  const float sum = part(x, w, row, column, m, n, k);
  if (row < m && column < n) atomicAdd(y + int64_t(row) * n + column, sum);
}

// the last block of a tile to come adds the parts; counter, one a tile, starts at zero and is left so
extern "C" __global__ void ticket(const __half* x, const __half* w, float* y, float* parts, int* counter, int m, int n,
                                  int k) {
  const int row = blockIdx.y * B + threadIdx.x / B, column = blockIdx.x * B + threadIdx.x % B;
  const bool inside = row < m && column < n;
  const float sum = part(x, w, row, column, m, n, k);
  if (inside) parts[(int64_t(blockIdx.z) * m + row) * n + column] = sum;
  __shared__ bool last;
  __threadfence();  // before the ticket
  __syncthreads();  // all have left their part
  const int tile = blockIdx.y * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) last = atomicAdd(counter + tile, 1) == gridDim.z - 1;
  __syncthreads();  // all know
  if (!last) return;
  __threadfence();  // after the ticket
  float total = 0;
  for (int z = 0; z < gridDim.z; z++) {
    if (inside) total += parts[(int64_t(z) * m + row) * n + column];
  }
  if (inside) y[int64_t(row) * n + column] = total;
  if (threadIdx.x == 0) counter[tile] = 0;
}
