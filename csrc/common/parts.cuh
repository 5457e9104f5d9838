// Sums that several blocks make together: each keeps its part of a tile, and whoever comes last to
// the tile adds the parts up, in their order.
#pragma once
#include "ptx.cuh"

namespace lk {

// a lane's sums of part `part`, among `scratch` [parts][COUNT][THREADS]
template <int THREADS, int COUNT>
__device__ float4* kept(float* scratch, int64_t part, int j) {
  return reinterpret_cast<float4*>(scratch) + (part * COUNT + j) * THREADS + threadIdx.x;
}

template <int THREADS, int COUNT>
__device__ void keep(const float (&sums)[COUNT][4], float* scratch, int64_t part) {
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    *kept<THREADS, COUNT>(scratch, part, j) = make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
  }
}

template <int THREADS, int COUNT>
__device__ void together(float (&sums)[COUNT][4], float* scratch, int64_t first, int parts) {
#pragma unroll
  for (auto& sum : sums) sum[0] = sum[1] = sum[2] = sum[3] = 0;
  for (int part = 0; part < parts; part++) {
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
      const float4 v = *kept<THREADS, COUNT>(scratch, first + part, j);
      sums[j][0] += v.x, sums[j][1] += v.y, sums[j][2] += v.z, sums[j][3] += v.w;
    }
  }
}

// whether this block is the last of `all` to come to a tile; what the others wrote before is seen
// then
__device__ inline bool last(int* ticket, int all) {
  __shared__ int is;
  __syncthreads();
  if (threadIdx.x == 0) {
    is = atom_inc_acq_rel(ticket) == all - 1;
    if (is) *ticket = 0;
  }
  __syncthreads();
  return is;
}

}  // namespace lk
