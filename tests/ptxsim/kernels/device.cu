// What kernels have beside their arguments: constants, variables, functions, assertions; halves, bytes and many words.
#include <assert.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#define KERNEL extern "C" __global__ void

struct Mixed {
  int a;
  float b;
  short c;
  double d;
};
__constant__ float factors[4] = {1.f, 2.5f, -3.f};
__constant__ Mixed mixed[2] = {{1, 2.f, 3, 4.0}, {5, 6.f, 7, 8.0}};
__device__ int counter = 10;
__device__ int table[5] = {1, 2, 3, 4, 5};
__device__ int* pointer = &table[2];

KERNEL constants(const int* which, double* made) {
  const int i = threadIdx.x;
  const Mixed& m = mixed[i & 1];
  made[i] = factors[which[i]] + m.a + m.b + m.c + m.d;
}
KERNEL variables(int* made) {
  const int i = threadIdx.x, ticket = atomicAdd(&counter, 1);
  made[ticket - 10] = pointer[i & 1] + table[i % 5];
}
KERNEL counts(const int* given, int* made) {
  const int i = threadIdx.x;
  made[i] = __syncthreads_count(given[i]) + 1000 * __syncthreads_and(given[i]) + 2000 * __syncthreads_or(given[i] > 7);
}
KERNEL matches(const int* given, const long long* wide, unsigned* made) {
  const int i = threadIdx.x;
  int same;
  const unsigned all = __match_all_sync(~0u, wide[i] >> 40, &same);
  made[i] = __match_any_sync(~0u, given[i]) ^ (__match_any_sync(~0u, wide[i]) * 3) ^ (all + same);
}
__device__ __noinline__ float helper(float a, int b, const float* c) { return a * b + *c; }
__device__ __noinline__ void change(Mixed from, Mixed* to) {
  to->a = from.a + 1;
  to->d = helper(from.b, from.c, &from.b);
}
KERNEL calls(const float* given, float* made) {
  const int i = threadIdx.x;
  Mixed from{i, given[i], 2, 3.0}, to{};
  change(from, &to);
  made[i] = helper(given[i], i, given + 1) + to.a + float(to.d);
}
KERNEL asserts(const int* given, int* made) {
  const int i = threadIdx.x;
  assert(given[i] > 0);
  made[i] = given[i];
  if (given[i] == 77) __trap();
}
KERNEL halves(const __half* x, const __half* y, const __half2* z, int* made) {
  const int i = threadIdx.x;
  const __half2 greater = __hgt2(z[i], z[i ^ 1]);
  made[i] = (x[i] > y[i]) + 2 * __hltu(x[i], y[i]) + 4 * __hisnan(x[i]) + 8 * __hbge2(z[i], z[i ^ 1]) +
            16 * int(float(greater.x)) + 32 * int(float(greater.y)) + 64 * __half2int_rd(x[i]) +
            (__hgt2_mask(z[i], z[i ^ 1]) & 0x80000000 ? 1 << 30 : 0);
}
KERNEL brains(const __nv_bfloat16* x, const __nv_bfloat16* y, const __nv_bfloat162* z, int* made) {
  const int i = threadIdx.x;
  const __nv_bfloat162 greater = __hgt2(z[i], z[i ^ 1]);
  made[i] = (x[i] > y[i]) + 2 * __hltu(x[i], y[i]) + 4 * __hisnan(x[i]) + 8 * __hbge2(z[i], z[i ^ 1]) +
            16 * int(float(greater.x)) + 32 * int(float(greater.y)) + 64 * __bfloat162int_rd(x[i]) +
            (__hgt2_mask(z[i], z[i ^ 1]) & 0x80000000 ? 1 << 30 : 0);
}
KERNEL bytes(const float* given, __nv_fp8_e4m3* narrow, float* made) {
  const int i = threadIdx.x;
  narrow[i] = __nv_fp8_e4m3(given[i]);
  made[i] = float(narrow[i]) + 1000 * float(__nv_fp8_e5m2(given[i]));
}
KERNEL shorts(const unsigned* given, unsigned* made) {
  const unsigned a = given[threadIdx.x], b = given[threadIdx.x ^ 1];
  made[threadIdx.x] = __vadd2(a, b) ^ __vmaxs2(a, b) ^ (__vminu2(a, b) * 3) ^ (__vmaxu2(a, b) * 5) ^
                      (__vmins2(a, b) * 7);
}
KERNEL quotients(const __int128* given, __int128* made) {
  const int i = threadIdx.x;
  made[i] = given[i] / given[i ^ 1] + given[i] % 1000003;
}
KERNEL products(const unsigned long long* given, unsigned long long* made) {
  const unsigned __int128 a = given[threadIdx.x], b = given[threadIdx.x ^ 1], c = a * b + (b << 32);
  made[threadIdx.x] = (unsigned long long)((c * a - (c << 1)) >> 64);
}
