// Any number of tokens, adapters of a token, and ranks, in any layout, for one slice of W: h of
// every entry of the plan, then in place y += Σ v ((g - 1) ⊙ z + g ⊙ h Bᵀ + c) + bias, z what
// stands in y, or that without its bias. Work and bytes follow the
// ranks: pages are read as far as an adapter has some, once for each block of its tokens.
#include "../common/kernels.h"
#include "../common/tiles.cuh"

namespace lk {

// h [parts, entries, ranks] = s · x Aᵀ of the entry's adapter, as far as it has ranks
struct MultiLoRAShrink {
  const void* x;                        // [tokens, k]
  Matrix a;                             // [rows, k], rank rows in pages of 8
  const int *table, *rank;              // [count, pages] [count]
  const float* scale;                   // [count]
  const int64_t *ids, *order, *starts;  // [entries] [entries] [count + 1]
  float* h;
  // columns of a part, a multiple of 64
  int64_t entries, each, k, count, pages, ranks, x_row, x_column, part;
};

struct MultiLoRAExpand {
  const float* h;                                // [parts, entries, ranks]
  void* y;                                       // [m, n]
  Matrix b;                                      // [rows, n], rank rows in pages of 8
  const int *table, *rank, *flags, *generation;  // [count, pages] [count] three times
  // [rows, n] twice, in row flags >> 2; there if flags have bit 0, bit 1
  const float *gain, *more;
  const int64_t *ids, *order;  // [m, each] [m], or null: as they come
  const float* weights;        // [m, each], or null
  int* error;                  // [1]
  Vector bias;                 // [n]
  int64_t m, n, each, count, pages, ranks, parts, y_row, y_column;
  int64_t holds;  // whether y has the bias in it
};

constexpr int PAGE = 8, THREADS = 128;
constexpr int ENTRIES = 64, STEP = 64, RANK = 16;                // of a block's step that makes h
constexpr int TOKENS = 32, COLUMNS = 128, TOKENS_OF_THREAD = 4;  // of a block that ends y; tokens of a thread

template <typename T>
__device__ void multi_shrink(const MultiLoRAShrink& p) {
  using B = __nv_bfloat16;
  __shared__ uint4 memory[(ENTRIES + 2 * RANK) * WIDTH / PIECE];
  __shared__ int64_t entry[ENTRIES];
  const int64_t first = blockIdx.x, id = p.ids[p.order[first]], slot = id & 0xffffffff;
  // another block has it
  if (id < 0 || slot >= p.count || (first - p.starts[slot]) % ENTRIES != 0) return;
  const int count = int(min(p.starts[slot + 1] - first, int64_t(ENTRIES)));
  if (threadIdx.x < count) entry[threadIdx.x] = p.order[first + threadIdx.x];
  __syncthreads();
  T* const x_tile = reinterpret_cast<T*>(memory);
  B *const a_tile = reinterpret_cast<B*>(x_tile + ENTRIES * STEP), *const a_rest = a_tile + RANK * STEP;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = threadIdx.x / 8, c = threadIdx.x % 8;
  const int64_t begin = int64_t(blockIdx.z) * p.part, end = min(p.k, begin + p.part), rank = p.rank[slot];
  const bool aligned = p.x_column == 1 && (reinterpret_cast<uintptr_t>(p.x) | uintptr_t(p.x_row * 2)) % PIECE == 0;
  const float scale = p.scale[slot];
  for (int64_t rank0 = blockIdx.y * RANK; rank0 < rank; rank0 += gridDim.y * RANK) {
    const int64_t mine = rank0 + row;  // the rank row that this thread copies of A
    const int64_t at = mine < rank ? int64_t(p.table[slot * p.pages + mine / PAGE]) * PAGE + mine % PAGE : 0;
    alignas(16) T xs[ENTRIES / 16][8];
    float as[8];
    const auto load = [&](int64_t column) {
      const int64_t inside = end - column;
#pragma unroll
      for (int i = 0; i < ENTRIES / 16; i++) {
        const int r = row + i * 16;
        const T* const from = static_cast<const T*>(p.x) + (r < count ? entry[r] / p.each * p.x_row : 0) +
                              column * p.x_column;
        if (aligned && r < count && inside >= 8) {
          *reinterpret_cast<uint4*>(xs[i]) = *reinterpret_cast<const uint4*>(from);
        } else {
#pragma unroll
          for (int j = 0; j < 8; j++) xs[i][j] = r < count && j < inside ? from[j * p.x_column] : T(0.f);
        }
      }
#pragma unroll
      for (int j = 0; j < 8; j++) as[j] = mine < rank && j < inside ? p.a(at, column + j) : 0.f;
    };
    float sums[RANK / 8][4] = {};
    load(begin + c * 8);
    for (int64_t column = begin; column < end; column += STEP) {
      alignas(16) B high[8], low[8];
#pragma unroll
      for (int j = 0; j < 8; j++) split(as[j], high[j], low[j]);
      __syncthreads();  // the tiles have been read
#pragma unroll
      for (int i = 0; i < ENTRIES / 16; i++) {
        *reinterpret_cast<uint4*>(piece(x_tile, row + i * 16, c)) = *reinterpret_cast<uint4*>(xs[i]);
      }
      *reinterpret_cast<uint4*>(piece(a_tile, row, c)) = *reinterpret_cast<uint4*>(high);
      *reinterpret_cast<uint4*>(piece(a_rest, row, c)) = *reinterpret_cast<uint4*>(low);
      __syncthreads();  // they are there
      load(column + STEP + c * 8);
#pragma unroll
      for (int i = 0; i < STEP / 16; i++) {
        uint32_t f[4], f_low[4], g[4], g_low[4];
        ldmatrix_x4(f, piece(x_tile, warp * 16 + lane % 16, 2 * i + lane / 16));
#pragma unroll
        for (int j = 0; j < 4; j++) split(f[j], f[j], f_low[j], T());
        ldmatrix_x4(g, piece(a_tile, lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
        ldmatrix_x4(g_low, piece(a_rest, lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
        mma_split<T>(sums[0], f, f_low, g[0], g[1], g_low[0], g_low[1]);
        mma_split<T>(sums[1], f, f_low, g[2], g[3], g_low[2], g_low[3]);
      }
    }
    for_each_accumulator(sums, [&](int r, int j, float sum) {
      const int local = warp * 16 + r;
      if (local >= count || rank0 + j >= rank) return;
      p.h[(blockIdx.z * p.entries + entry[local]) * p.ranks + rank0 + j] = scale * sum;
    });
  }
}

// Which of a tile's tokens have an adapter, and what it counts.
struct TileTokens {
  int64_t token[TOKENS];  // or -1
  int slot[TOKENS];       // or -1
  float weight[TOKENS];
};

__device__ inline void read_slots(TileTokens& tokens, const MultiLoRAExpand& p, int64_t i) {
  const int64_t token = tokens.token[threadIdx.x], id = token < 0 ? -1 : p.ids[token * p.each + i],
                at = id & 0xffffffff;
  const bool known = id >= 0 && at < p.count && p.generation[at] == int(id >> 32);
  if (id != -1 && !known) atomicExch(p.error, 1);
  tokens.slot[threadIdx.x] = known ? int(at) : -1;
  tokens.weight[threadIdx.x] = known && p.weights ? p.weights[token * p.each + i] : 1.f;
}

// delta = h Bᵀ of four tokens and eight columns of a thread, of the tokens that have the adapter in
// `slot`
__device__ inline void multiply(float (&delta)[TOKENS_OF_THREAD][8], float (&hs)[RANK][TOKENS],
                                float (&bs)[RANK][COLUMNS], const TileTokens& tokens, const MultiLoRAExpand& p,
                                int slot, int64_t i, int64_t column) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, rank = p.rank[slot];
#pragma unroll
  for (auto& of_token : delta) {
#pragma unroll
    for (float& sum : of_token) sum = 0;
  }
  for (int first = 0; first < rank; first += RANK) {
    __syncthreads();  // the tiles have been read
    for (int at = threadIdx.x; at < RANK * TOKENS; at += THREADS) {
      const int t = at % TOKENS, r = at / TOKENS;
      float sum = 0;
      if (tokens.slot[t] == slot && first + r < rank) {
        const float* const from = p.h + (tokens.token[t] * p.each + i) * p.ranks + first + r;
        for (int64_t part = 0; part < p.parts; part++) sum += from[part * p.m * p.each * p.ranks];
      }
      hs[r][t] = sum;
    }
#pragma unroll
    for (int r = 0; r < RANK; r++) {
      const int64_t n = column + threadIdx.x;
      const bool inside = first + r < rank && n < p.n;
      const int64_t row = inside ? int64_t(p.table[slot * p.pages + (first + r) / PAGE]) * PAGE + (first + r) % PAGE
                                 : 0;
      bs[r][threadIdx.x] = inside ? p.b(row, n) : 0.f;
    }
    __syncthreads();  // they are there
#pragma unroll
    for (int r = 0; r < RANK; r++) {
      const float4 h = *reinterpret_cast<const float4*>(&hs[r][ty * TOKENS_OF_THREAD]);
      const float4 low = *reinterpret_cast<const float4*>(&bs[r][tx * 4]);
      const float4 high = *reinterpret_cast<const float4*>(&bs[r][COLUMNS / 2 + tx * 4]);
      const float of_h[TOKENS_OF_THREAD] = {h.x, h.y, h.z, h.w};
      const float of_b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int t = 0; t < TOKENS_OF_THREAD; t++) {
#pragma unroll
        for (int j = 0; j < 8; j++) delta[t][j] += of_h[t] * of_b[j];
      }
    }
  }
}

// A thread has four neighbouring columns of each half of the tile.
template <typename T>
__device__ void multi_expand(const MultiLoRAExpand& p) {
  __shared__ TileTokens tokens;
  __shared__ __align__(16) float hs[RANK][TOKENS], bs[RANK][COLUMNS];
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t first = int64_t(blockIdx.x) * TOKENS, column = int64_t(blockIdx.y) * COLUMNS;
  if (threadIdx.x < TOKENS) {
    const int64_t at = first + threadIdx.x;
    tokens.token[threadIdx.x] = at >= p.m ? -1 : p.order ? p.order[at] : at;
  }
  __syncthreads();
  const auto column_of = [&](int j) { return column + j / 4 * (COLUMNS / 2) + tx * 4 + j % 4; };
  float z[TOKENS_OF_THREAD][8], total[TOKENS_OF_THREAD][8];
#pragma unroll
  for (int t = 0; t < TOKENS_OF_THREAD; t++) {
    const int64_t token = tokens.token[ty * TOKENS_OF_THREAD + t];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const bool inside = token >= 0 && column_of(j) < p.n;
      const float bias_in_y = p.holds && p.bias.data && column_of(j) < p.n ? p.bias[column_of(j)] : 0.f;
      const T* const y = static_cast<const T*>(p.y) + token * p.y_row + column_of(j) * p.y_column;
      total[t][j] = z[t][j] = inside ? to_float(*y) - bias_in_y : 0.f;
    }
  }
  for (int64_t i = 0; i < p.each; i++) {
    __syncthreads();  // the slots before have been read
    if (threadIdx.x < TOKENS) read_slots(tokens, p, i);
    __syncthreads();
    for (int slot = -1;;) {
      int next = 0x7fffffff;
      for (int t = 0; t < TOKENS; t++) next = tokens.slot[t] > slot ? min(next, tokens.slot[t]) : next;
      if (next == 0x7fffffff) break;
      slot = next;
      float delta[TOKENS_OF_THREAD][8];
      multiply(delta, hs, bs, tokens, p, slot, i, column);
      const int flags = p.flags[slot];
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if (column_of(j) >= p.n) continue;
        const int64_t at = int64_t(flags >> 2) * p.n + column_of(j);
        const float gain = flags & 1 ? p.gain[at] : 1.f, more = flags & 2 ? p.more[at] : 0.f;
#pragma unroll
        for (int t = 0; t < TOKENS_OF_THREAD; t++) {
          const int mine = ty * TOKENS_OF_THREAD + t;
          const float share = (gain - 1) * z[t][j] + gain * delta[t][j] + more;
          if (tokens.slot[mine] == slot) total[t][j] += tokens.weight[mine] * share;
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS_OF_THREAD; t++) {
    const int64_t token = tokens.token[ty * TOKENS_OF_THREAD + t];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (token < 0 || column_of(j) >= p.n) continue;
      const float bias = p.bias.data ? p.bias[column_of(j)] : 0.f;
      static_cast<T*>(p.y)[token * p.y_row + column_of(j) * p.y_column] = rounded<T>(total[t][j] + bias);
    }
  }
}

}  // namespace lk

#define LK_MULTI(name, kernel, Struct, T)                                                                   \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 2) name(const __grid_constant__ lk::Struct p) { \
    lk::kernel<T>(p);                                                                                       \
  }
LK_MULTI(multi_lora_shrink_bf16, multi_shrink, MultiLoRAShrink, __nv_bfloat16)
LK_MULTI(multi_lora_shrink_f16, multi_shrink, MultiLoRAShrink, __half)
LK_MULTI(multi_lora_expand_bf16, multi_expand, MultiLoRAExpand, __nv_bfloat16)
LK_MULTI(multi_lora_expand_f16, multi_expand, MultiLoRAExpand, __half)

LK_TABLE(multi_lora_any, MultiLoRAExpand, LK_KERNEL_OF(multi_lora_shrink_bf16, MultiLoRAShrink),
         LK_KERNEL_OF(multi_lora_shrink_f16, MultiLoRAShrink), LK_KERNEL(multi_lora_expand_bf16),
         LK_KERNEL(multi_lora_expand_f16))
