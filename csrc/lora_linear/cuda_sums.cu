// What is left of a backward when the big reads are done: sums of parts, in their order; and the
// gradients of gains of zero.
#include "../common/kernels.h"
#include "../common/tiles.cuh"

namespace lk {

// out [n, r] = factor · gain ⊙ (Σ part [parts, n, r]) / divisor, left alone where the divisor is
// zero
struct Job {
  const float* part;
  void* out;
  int64_t dtype;         // of out, as of a Vector
  Vector gain, divisor;  // [n]
  int64_t parts, n, r;
};

constexpr int JOBS = 4, THREADS = 256;

struct LoRALinearSums {
  Job jobs[JOBS];  // those with n of zero are none
  float factors[JOBS];
};

__device__ inline void store_number(void* out, int64_t dtype, int64_t at, float v) {
  if (dtype == 0) static_cast<float*>(out)[at] = v;
  if (dtype == 1) static_cast<__nv_bfloat16*>(out)[at] = __float2bfloat16_rn(v);
  if (dtype == 2) static_cast<__half*>(out)[at] = __float2half_rn(v);
}

// dgain[n] = Σ over tokens of dy[n] · z[n] where gain[n] is zero, which y does not tell. A block
// looks at one n.
struct LoRALinearZeroGain {
  Matrix dy, x, w, b;    // [m, n] [m, k] [n, k] [n, r]; where it has a scale for each row w is int8
  const float* h;        // [m, r]
  void* dgain;           // [n]
  int64_t dtype;         // of dgain
  Vector gain, w_scale;  // [n]
  int64_t m, k, r;
};

__device__ inline float block_sum(float v) {
  __shared__ float sums[THREADS / 32];
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
  for (float sum : sums) total += sum;
  return total;
}

}  // namespace lk

extern "C" __global__ void __launch_bounds__(256) lora_linear_sums(const __grid_constant__ lk::LoRALinearSums p) {
  int64_t at = int64_t(blockIdx.x) * lk::THREADS + threadIdx.x;
#pragma unroll
  for (int j = 0; j < lk::JOBS; j++) {
    const lk::Job& job = p.jobs[j];
    const int64_t size = job.n * job.r;
    if (at >= 0 && at < size) {
      float sum = 0;
      for (int64_t part = 0; part < job.parts; part++) sum += job.part[part * size + at];
      if (job.gain.data) sum *= job.gain[at / job.r];
      const float divisor = job.divisor.data ? job.divisor[at / job.r] : 1.f;
      const float quotient = job.divisor.data ? sum / divisor : sum;
      if (divisor != 0) lk::store_number(job.out, job.dtype, at, p.factors[j] * quotient);
    }
    // each job begins with a block of its own
    at -= (size + lk::THREADS - 1) / lk::THREADS * lk::THREADS;
  }
}

extern "C" __global__ void __launch_bounds__(256)
    lora_linear_zero_gain(const __grid_constant__ lk::LoRALinearZeroGain p) {
  const int64_t n = blockIdx.x;
  if (p.gain[n] != 0) return;
  const float scale = p.w_scale.data ? p.w_scale[n] : 1.f;
  float sum = 0;
  for (int64_t k = threadIdx.x; k < p.k; k += lk::THREADS) {
    float of_x = 0;
    for (int64_t row = 0; row < p.m; row++) of_x += p.dy(row, n) * p.x(row, k);
    const int64_t at = n * p.w.row + k * p.w.column;
    sum += of_x * (p.w_scale.data ? scale * static_cast<const int8_t*>(p.w.data)[at] : p.w(n, k));
  }
  for (int64_t r = threadIdx.x; r < p.r; r += lk::THREADS) {
    float of_h = 0;
    for (int64_t row = 0; row < p.m; row++) of_h += p.dy(row, n) * p.h[row * p.r + r];
    sum += of_h * p.b(n, r);
  }
  sum = lk::block_sum(sum);
  if (threadIdx.x == 0) lk::store_number(p.dgain, p.dtype, n, sum);
}

LK_TABLE(lora_linear_sums, LoRALinearSums, LK_KERNEL(lora_linear_sums),
         LK_KERNEL_OF(lora_linear_zero_gain, LoRALinearZeroGain))
