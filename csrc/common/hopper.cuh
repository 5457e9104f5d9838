// Instructions of sm_90a: warp groups, barriers that count, copies by the tensor memory
// accelerator. PTX ISA 9.7.13 mbarrier, 9.7.9.27 cp.async.bulk.tensor, 9.7.15 wgmma, 9.7.20
// setmaxnreg.
#pragma once
#include <type_traits>

#include "ptx.cuh"

namespace lk {

// of a matrix, for copies of tiles: what cuTensorMapEncodeTiled makes
struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

__device__ inline void mbarrier_init(uint64_t* at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(arrivals));
}
// what was initialised is seen by copies and other threads
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void mbarrier_arrive(uint64_t* at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}
__device__ inline void mbarrier_arrive_expect_tx(uint64_t* at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes)
               : "memory");
}
// until the phase of that parity has ended
__device__ inline void mbarrier_wait(uint64_t* at, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n .reg .pred complete;\n mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        " selp.u32 %0, 1, 0, complete;\n}"
        : "=r"(done)
        : "r"(shared_address(at)), "r"(parity)
        : "memory");
  }
}

// a box of a matrix from (row, column) on; zeros beyond its edges
__device__ inline void copy_box(void* to, const TensorMap& map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
// nothing is written beyond the matrix's edges
__device__ inline void store_box(const TensorMap& map, int column, int row, const void* from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column),
               "r"(row), "r"(shared_address(from))
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// of this thread's stores all but LEFT have read shared memory
template <int LEFT>
__device__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}
__device__ inline void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// shows what this thread wrote to shared memory to copies in bulk
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void bar_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ inline void stmatrix_x4(void* row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}

// A tile of wgmma in shared memory whose rows of 128 bytes are exchanged as those of a copied box,
// at a multiple of 1024 bytes.
// ACROSS: the rows are those of the depth, and `group` bytes lie between two 64 columns of it; else
// they run along the depth.
template <bool ACROSS>
__device__ uint64_t wgmma_operand(const void* tile, int group) {
  return uint64_t(shared_address(tile)) >> 4 | uint64_t(ACROSS ? group >> 4 : 1) << 16 | uint64_t(1024 >> 4) << 32 |
         uint64_t(1) << 62;
}
// what 16 numbers along the depth add to it
template <bool ACROSS>
constexpr uint64_t WGMMA_STEP = ACROSS ? 16 * 128 >> 4 : 16 * 2 >> 4;

using WgmmaAccumulators = float[128];  // of a thread: 64 rows and 256 columns in a warp group

__device__ inline void wgmma_fence(WgmmaAccumulators& d) {
#pragma unroll
  for (int i = 0; i < 128; i++) asm volatile("" : "+f"(d[i])::"memory");  // no product moves across
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ void wgmma_wait(WgmmaAccumulators& d) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#pragma unroll
  for (int i = 0; i < 128; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define LK_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LK_SUMS_16(i) LK_SUMS_4(i), LK_SUMS_4(i + 4), LK_SUMS_4(i + 8), LK_SUMS_4(i + 12)
#define LK_WGMMA(kind)                                                                                                 \
  asm volatile(                                                                                                        \
      "{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n"                                                                  \
      " wgmma.mma_async.sync.aligned.m64n256k16.f32." kind "." kind                                                    \
      " "                                                                                                              \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                        \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                               \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                               \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                               \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                               \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                               \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                   \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"                \
      ", %128, %129, p, 1, 1, 0, %131;\n}"                                                                             \
      : LK_SUMS_16(0), LK_SUMS_16(16), LK_SUMS_16(32), LK_SUMS_16(48), LK_SUMS_16(64), LK_SUMS_16(80), LK_SUMS_16(96), \
        LK_SUMS_16(112)                                                                                                \
      : "l"(a), "l"(b), "r"(int(added)), "n"(int(ACROSS)))
// d = a b, or d + a b if `added`; issued, not waited for. a [64, 16] by rows, b [16, 256] by
// columns or, if ACROSS, by rows
template <typename T, bool ACROSS>
__device__ void wgmma_m64n256k16(WgmmaAccumulators& d, uint64_t a, uint64_t b, bool added) {
  if constexpr (std::is_same<T, __half>::value) {
    LK_WGMMA("f16");
  } else {
    LK_WGMMA("bf16");
  }
}
#undef LK_WGMMA
#undef LK_SUMS_16
#undef LK_SUMS_4

}  // namespace lk
