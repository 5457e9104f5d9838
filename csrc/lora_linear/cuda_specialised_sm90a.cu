// y = gain ⊙ z + bias with z = x Wᵀ + h Bᵀ, and dx = dy W + drop(P A), by warp groups of sm_90a
// with tasks of their own. One thread copies tiles into a ring of stages, two warp groups multiply
// 64 rows each; a block takes tile after tile, so that the next one's copies run while the sums of
// one are written. The adapter is some more steps of the same ring before those of the base: 32
// ranks of h and of what bfloat16 leaves of it side by side, and of B likewise where it is not
// bfloat16.
#include "../common/gemm.cuh"
#include "../common/hopper.cuh"
#include "../common/kernels.h"
#include "../common/philox.cuh"

namespace lk {

// of a tile and of a step; ranks of a step
constexpr int ROWS = 128, ACROSS = 256, DEPTH = 64, CHUNK = 32, RING = 4;
constexpr int A_BYTES = ROWS * WIDTH, B_BYTES = ACROSS * WIDTH, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int BOX = 64, BOX_BYTES = BOX * WIDTH;  // rows and columns of what is stored at a time
constexpr int GROUP = 128, SPECIALISED_THREADS = 3 * GROUP;

// x [m, depth], w [n, depth] or for dx [depth, n], h [m, 64 chunks], b as w with the ranks for
// depth, y and z [m, n]
struct LoRALinearSpecialised {
  TensorMap x, w, h, b, y, z;
  Vector bias, gain;  // [n]
  Dropout dropout;    // of h bᵀ
  int64_t m, n, depth, r;
  int64_t split;        // b lies as h does
  int64_t keep_z;       // z is wanted
  int64_t group, slab;  // the order of the tiles: ops/cost.py
  float inverse;        // of the share that dropout keeps
};

struct SharedStorage {
  unsigned char stages[RING][STAGE_BYTES];
  unsigned char boxes[2][2][BOX_BYTES];  // of each warp group, to store
  uint64_t full[RING], empty[RING];
};

// which stage is next, and the parity of its phase
struct PipelineState {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == RING) stage = 0, parity ^= 1;
  }
};

// f(row, column) of this block's tiles
template <typename F>
__device__ void for_each_tile(const LoRALinearSpecialised& p, F&& f) {
  const int64_t tile_rows = (p.m + ROWS - 1) / ROWS, tile_columns = (p.n + ACROSS - 1) / ACROSS;
  for (int64_t tile = blockIdx.x; tile < tile_rows * tile_columns; tile += gridDim.x) {
    int64_t row, column;
    swizzled_tile(tile, tile_rows, tile_columns, p.group, p.slab, row, column);
    f(int(row * ROWS), int(column * ACROSS));
  }
}

// the thread that copies. DX: boxes of W are 64 columns wide, and four of them lie behind one
// another
template <bool DX>
__device__ void producer(const LoRALinearSpecialised& p, SharedStorage& shared) {
  const int chunks = int((p.r + CHUNK - 1) / CHUNK), steps = int((p.depth + DEPTH - 1) / DEPTH);
  PipelineState state;
  for_each_tile(p, [&](int row, int column) {
    for (int step = -chunks; step < steps; step++) {
      uint64_t* const full = &shared.full[state.stage];
      unsigned char* const a = shared.stages[state.stage];
      mbarrier_wait(&shared.empty[state.stage], state.parity ^ 1);
      mbarrier_arrive_expect_tx(full, STAGE_BYTES);
      const bool adapter = step < 0;
      const int chunk = step + chunks;
      copy_box(a, adapter ? p.h : p.x, (adapter ? chunk : step) * DEPTH, row, full);
      const TensorMap& b = adapter ? p.b : p.w;
      const int depth = adapter ? chunk * (p.split ? DEPTH : CHUNK) : step * DEPTH;
      if constexpr (DX) {
        for (int i = 0; i < ACROSS / BOX; i++) copy_box(a + A_BYTES + i * BOX_BYTES, b, column + i * BOX, depth, full);
      } else {
        copy_box(a + A_BYTES, b, depth, column, full);
      }
      state.advance();
    }
  });
}

// d = mask ⊙ inverse d. Two lanes look at four neighbours of two rows: each draws for one row and
// passes on what is not its own.
__device__ inline void apply_dropout(const LoRALinearSpecialised& p, WgmmaAccumulators& d, int64_t row,
                                     int64_t column) {
  const uint64_t seed = uint64_t(p.dropout.at ? *p.dropout.at : p.dropout.seed);
  const uint32_t threshold = uint32_t(p.dropout.threshold);
  const int lane = threadIdx.x % 32, odd = lane % 2;
  const int64_t m = row + threadIdx.x % GROUP / 32 * 16 + lane / 4 + odd * 8, n = column + lane % 4 / 2 * 4;
#pragma unroll
  for (int part = 0; part < 4; part++) {
    uint32_t mask = 0;  // bits: all words at once would take more registers than there are
#pragma unroll 1
    for (int j = 0; j < 8; j++) {
      const uint4 words = philox(seed, uint32_t((n + (part * 8 + j) * 8) / 4), uint64_t(m));
      const uint32_t first = __shfl_xor_sync(0xffffffffu, odd ? words.x : words.z, 1);
      const uint32_t second = __shfl_xor_sync(0xffffffffu, odd ? words.y : words.w, 1);
      const uint32_t mine[4] = {odd ? first : words.x, odd ? second : words.y, odd ? words.z : first,
                                odd ? words.w : second};
#pragma unroll
      for (int l = 0; l < 4; l++) mask |= uint32_t(mine[l] >= threshold) << (j * 4 + l);
    }
#pragma unroll
    for (int i = 0; i < 32; i++) d[part * 32 + i] = mask >> i & 1 ? p.inverse * d[part * 32 + i] : 0.f;
  }
}

// d = gain ⊙ d + bias
__device__ inline void rescale(const LoRALinearSpecialised& p, WgmmaAccumulators& d, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < ACROSS / BOX; c++) {
    float gain[2] = {1.f, 1.f}, bias[2] = {};  // of two of 64 columns; other lanes have the others
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int n = column + c * BOX + lane * 2 + i;
      if (p.gain.data && n < p.n) gain[i] = p.gain[n];
      if (p.bias.data && n < p.n) bias[i] = p.bias[n];
    }
#pragma unroll
    for (int j = 0; j < BOX / 8; j++) {
      float* const sums = d + (c * BOX / 8 + j) * 4;
#pragma unroll
      for (int l = 0; l < 2; l++) {
        const float mine = __shfl_sync(~0u, gain[l], j * 4 + lane % 4),
                    more = __shfl_sync(~0u, bias[l], j * 4 + lane % 4);
        sums[l] = mine * sums[l] + more;
        sums[l + 2] = mine * sums[l + 2] + more;
      }
    }
  }
}

// the sums of 64 rows to a matrix, 64 columns at a time by way of shared memory
template <typename T>
__device__ void store_tile(const TensorMap& map, SharedStorage& shared, const WgmmaAccumulators& d, int row,
                           int column) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % GROUP / 32, group = threadIdx.x / GROUP - 1;
#pragma unroll
  for (int c = 0; c < ACROSS / BOX; c++) {
    T* const box = reinterpret_cast<T*>(shared.boxes[group][c % 2]);
    if (threadIdx.x % GROUP == 0) store_wait_read<1>();  // what was here has been read
    bar_sync(1 + group, GROUP);
#pragma unroll
    for (int j = 0; j < BOX / 8; j += 2) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int at = (c * BOX / 8 + j + i / 2) * 4 + i % 2 * 2;
        const T two[2] = {rounded<T>(d[at]), rounded<T>(d[at + 1])};
        memcpy(&pairs[i], two, sizeof two);
      }
      stmatrix_x4(piece(box, warp * 16 + lane % 16, j + lane / 16), pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    fence_proxy_async();
    bar_sync(1 + group, GROUP);
    if (threadIdx.x % GROUP == 0) store_box(map, column + c * BOX, row, box);
  }
}

// a warp group that multiplies 64 rows of each tile
template <typename T, bool DX, bool DROPS>
__device__ void consumer(const LoRALinearSpecialised& p, SharedStorage& shared) {
  const int chunks = int((p.r + CHUNK - 1) / CHUNK), steps = int((p.depth + DEPTH - 1) / DEPTH);
  // known to be the same in a warp
  const int half = (__shfl_sync(~0u, threadIdx.x / GROUP, 0) - 1) * BOX;
  constexpr uint64_t NEXT_A = WGMMA_STEP<false>, NEXT_B = WGMMA_STEP<DX>;
  PipelineState state;
  for_each_tile(p, [&](int row, int column) {
    WgmmaAccumulators d;
    bool added = false;
    int reading = -1;  // the stage that is being read
    // issue(a, b) of one stage; all but its last group are waited for, so that the stage before it
    // is free
    const auto step = [&](auto&& issue) {
      const unsigned char* const a = shared.stages[state.stage];
      mbarrier_wait(&shared.full[state.stage], state.parity);
      issue(wgmma_operand<false>(a + half * WIDTH, 0), wgmma_operand<DX>(a + A_BYTES, BOX_BYTES));
      wgmma_wait<1>(d);
      if (reading >= 0 && threadIdx.x % 32 == 0) mbarrier_arrive(&shared.empty[reading]);
      reading = state.stage;
      state.advance();
    };
    for (int chunk = 0; chunk < chunks; chunk++) {
      // of 16 ranks each: h times b, what is left of h times b, and h times what is left of b
      const int blocks = int(min(p.r - chunk * CHUNK + 15, int64_t(CHUNK)) / 16), products = blocks * (p.split ? 3 : 2);
      step([&](uint64_t a, uint64_t b) {
        int i = 0;
        do {
          const int block = i % blocks, of = i / blocks;
          wgmma_fence(d);
          wgmma_m64n256k16<__nv_bfloat16, DX>(d, a + (block + of % 2 * 2) * NEXT_A, b + (block + of / 2 * 2) * NEXT_B,
                                              added);
          wgmma_commit();  // in the loop, or ptxas adds an empty product after it
          added = true;
        } while (++i < products);
      });
    }
    if constexpr (DROPS) {
      wgmma_wait<0>(d);
      if (chunks) apply_dropout(p, d, row + half, column);
    }
    for (int i = 0; i < steps; i++) {
      step([&](uint64_t a, uint64_t b) {
        wgmma_fence(d);
#pragma unroll
        for (int j = 0; j < DEPTH / 16; j++) {
          wgmma_m64n256k16<T, DX>(d, a + j * NEXT_A, b + j * NEXT_B, added);
          added = true;
        }
        wgmma_commit();
      });
    }
    wgmma_wait<0>(d);
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.empty[reading]);
    if constexpr (!DX) {
      if (p.keep_z) store_tile<T>(p.z, shared, d, row + half, column);
      if (p.gain.data || p.bias.data) rescale(p, d, column);
    }
    store_tile<T>(p.y, shared, d, row + half, column);
  });
  if (threadIdx.x % GROUP == 0) store_wait();
}

template <typename T, bool DX, bool DROPS>
__device__ void specialised(const LoRALinearSpecialised& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < RING; i++) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], 2 * GROUP / 32);  // a lane of each warp that multiplies
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < GROUP) {
    setmaxnreg_dec<40>();
    if (threadIdx.x == 0) producer<DX>(p, shared);
  } else {
    setmaxnreg_inc<232>();
    consumer<T, DX, DROPS>(p, shared);
  }
}

// Numbers of a thin matrix as two of bfloat16, 32 ranks and then what those leave; its parts are
// added up
struct LoRALinearPairs {
  Matrix from;          // [rows, ranks], the first part
  int64_t parts, part;  // how many, and numbers between them
  void* out;            // [rows, chunks, 2, 32] by the strides, zeros beyond the ranks
  float* whole;         // [rows, ranks]: the sum; or null
  int64_t rows, ranks;
  int64_t row, chunk, rest, rank;  // strides of out
};

__device__ inline void pairs(const LoRALinearPairs& p) {
  const int64_t all = (p.ranks + CHUNK - 1) / CHUNK * CHUNK, at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= p.rows * all) return;
  // neighbours write neighbours
  const int64_t i = p.row == 1 ? at % p.rows : at / all, j = p.row == 1 ? at / p.rows : at % all;
  float sum = 0.f;
  if (j < p.ranks) {
    sum = p.from(i, j);
    for (int64_t part = 1; part < p.parts; part++) {
      sum += Vector{p.from.data, p.from.dtype}[part * p.part + i * p.from.row + j * p.from.column];
    }
    if (p.whole) p.whole[i * p.ranks + j] = sum;
  }
  __nv_bfloat16 high, low;
  split(sum, high, low);
  __nv_bfloat16* const to = static_cast<__nv_bfloat16*>(p.out) + i * p.row + j / CHUNK * p.chunk + j % CHUNK * p.rank;
  to[0] = high;
  to[p.rest] = low;
}

}  // namespace lk

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LK_BODY(T, DX, DROPS) lk::specialised<T, DX, DROPS>(p);
#else
#define LK_BODY(T, DX, DROPS)  // never launched: lora_kernels/ops/launch.py
#endif
#define LK_SPECIALISED(name, T, DX, DROPS)                                 \
  extern "C" __global__ void __launch_bounds__(lk::SPECIALISED_THREADS, 1) \
      name(const __grid_constant__ lk::LoRALinearSpecialised p) {          \
    LK_BODY(T, DX, DROPS)                                                  \
  }
LK_SPECIALISED(lora_linear_specialised_bf16, __nv_bfloat16, false, false)
LK_SPECIALISED(lora_linear_specialised_f16, __half, false, false)
LK_SPECIALISED(lora_linear_specialised_dx_bf16, __nv_bfloat16, true, false)
LK_SPECIALISED(lora_linear_specialised_dx_f16, __half, true, false)
LK_SPECIALISED(lora_linear_specialised_dx_drop_bf16, __nv_bfloat16, true, true)
LK_SPECIALISED(lora_linear_specialised_dx_drop_f16, __half, true, true)

extern "C" __global__ void __launch_bounds__(256) lora_linear_pairs(const __grid_constant__ lk::LoRALinearPairs p) {
  lk::pairs(p);
}

LK_TABLE(lora_linear_specialised, LoRALinearSpecialised, LK_KERNEL(lora_linear_specialised_bf16),
         LK_KERNEL(lora_linear_specialised_f16), LK_KERNEL(lora_linear_specialised_dx_bf16),
         LK_KERNEL(lora_linear_specialised_dx_f16), LK_KERNEL(lora_linear_specialised_dx_drop_bf16),
         LK_KERNEL(lora_linear_specialised_dx_drop_f16), LK_KERNEL_OF(lora_linear_pairs, LoRALinearPairs))
