// What matmul.cu and lora.cu share: cp.async, ldmatrix, mma, and a swizzled tile. bf16, or fp16 with -DHALF.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef HALF
using Element = __half;
using Pair = __half2;
#define KIND "f16"
__device__ Element narrow(float v) { return __float2half_rn(v); }
#else
using Element = __nv_bfloat16;
using Pair = __nv_bfloat162;
#define KIND "bf16"
__device__ Element narrow(float v) { return __float2bfloat16_rn(v); }
#endif
__device__ Pair narrow(float v, float w) { return Pair(narrow(v), narrow(w)); }

__device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ void copy16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
__device__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

constexpr int BK = 32;
// 32 numbers a row, 4 pieces of 16 bytes, exchanged so that 8 rows of one column differ in banks
template <int ROWS>
using Tile = Element[ROWS][BK];

template <int ROWS>
__device__ Element* piece(Element (&tile)[ROWS][BK], int row, int column) {
  return &tile[row][(column ^ (row / 2 % 4)) * 8];
}

// rows `first` on and columns `k` on of a matrix [rows, depth]; zeros beyond its edges
template <int ROWS, int THREADS>
__device__ void load_tile(Element (&tile)[ROWS][BK], const Element* m, int first, int rows, int k, int depth) {
  constexpr int PIECES = ROWS * BK / 8;
  // not a loop from threadIdx.x on, which nvcc does not unroll
  for (int part = 0; part < (PIECES + THREADS - 1) / THREADS; part++) {
    const int i = part * THREADS + threadIdx.x;
    if (PIECES % THREADS && i >= PIECES) break;
    const int row = i / 4, column = i % 4;
    const bool inside = first + row < rows && k + column * 8 < depth;
    const Element* from = inside ? m + int64_t(first + row) * depth + k + column * 8 : m;
    copy16(piece(tile, row, column), from, inside ? 16 : 0);
  }
}
