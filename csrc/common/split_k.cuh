// Split-K: several blocks sum parts of one tile's depth; whoever comes last to the tile adds the
// parts up, in their order.
#pragma once
#include "ptx.cuh"

namespace lk {

// a lane's sums of part `part`, among `scratch` [parts][COUNT][THREADS]
template <int THREADS, int COUNT>
__device__ float4* partial_at(float* scratch, int64_t part, int j) {
  return reinterpret_cast<float4*>(scratch) + (part * COUNT + j) * THREADS + threadIdx.x;
}

template <int THREADS, int COUNT>
__device__ void store_partials(const float (&sums)[COUNT][4], float* scratch, int64_t part) {
#pragma unroll
  for (int j = 0; j < COUNT; j++) {
    *partial_at<THREADS, COUNT>(scratch, part, j) = make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
  }
}

template <int THREADS, int COUNT>
__device__ void reduce_split_k(float (&sums)[COUNT][4], float* scratch, int64_t first, int parts) {
#pragma unroll
  for (auto& sum : sums) sum[0] = sum[1] = sum[2] = sum[3] = 0;
  for (int part = 0; part < parts; part++) {
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
      const float4 v = *partial_at<THREADS, COUNT>(scratch, first + part, j);
      sums[j][0] += v.x, sums[j][1] += v.y, sums[j][2] += v.z, sums[j][3] += v.w;
    }
  }
}

// whether this block comes last of `blocks` to a tile; it sees what the others wrote before
__device__ inline bool is_last_block(int* ticket, int blocks) {
  __shared__ int is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atom_inc_acq_rel(ticket) == blocks - 1;
    if (is_last) *ticket = 0;
  }
  __syncthreads();
  return is_last;
}

}  // namespace lk
