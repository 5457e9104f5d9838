// y[t] = g ⊙ (W x[t] + s B A x[t]) + c + bias with A, B, s, g and c of the adapter of token t, or
// none, for at most 64 tokens, in one launch that reads W and the factors of each adapter once.
// Ranks are ragged; work and bytes follow their sum.
//
// Tokens come in the order of the plan: those of an adapter are neighbours. They are the narrow
// side of each product. Blocks take parts of A's tiles, 64 rank rows of one adapter, and of W's, 64
// rows of a slice; nobody waits for another block. The sums of A's parts are written as they are.
// Whoever comes last to a tile of W ends it, once h of its slice is complete, too: the last block
// of A's counts as one that comes to every tile. So it does not matter in which order blocks run,
// or how many of them do at once; and sums are added in the order of the parts, whoever does it.
#include "../common/kernels.h"
#include "../common/pipeline.cuh"
#include "../common/split_k.cuh"
#include "batch.cuh"

namespace lk {

// A thread's copies of a tile of COUNT rows of 128 bytes: the same piece of every 16th row, from
// where `row_of` says.
template <typename T, int COUNT>
struct TileCopy {
  static constexpr int ROWS_OF_THREAD = COUNT * 8 / THREADS;
  const T* row[ROWS_OF_THREAD];  // or null, for zeros

  template <typename RowOf>
  __device__ explicit TileCopy(RowOf&& row_of) {
#pragma unroll
    for (int i = 0; i < ROWS_OF_THREAD; i++) row[i] = row_of(int(threadIdx.x) / 8 + i * (THREADS / 8));
  }
  // columns from `column` on, of those before `columns`; `any` is memory of which nothing is read
  __device__ void operator()(T* tile, int64_t column, int64_t columns, const void* any) const {
    const int64_t at = column + threadIdx.x % 8 * 8;
#pragma unroll
    for (int i = 0; i < ROWS_OF_THREAD; i++) {
      const bool inside = row[i] && at < columns;
      cp_async(piece(tile, int(threadIdx.x) / 8 + i * (THREADS / 8), int(threadIdx.x) % 8), inside ? row[i] + at : any,
               inside ? PIECE : 0);
    }
  }
};

// sums = rows · xᵀ over columns `begin` to `end` for `tokens` positions from `from` on
template <typename T, int TOKENS, int STAGES, typename RowOf>
__device__ void mainloop(float (&sums)[TOKENS / 8][4], char* memory, const Batch& batch, const MultiLoRASmall& p,
                         int from, int tokens, int64_t begin, int64_t end, int rows, RowOf&& row_of) {
  constexpr int BYTES = (ROWS + TOKENS) * WIDTH;
  const int steps = int((end - begin + RANKS - 1) / RANKS);
  const bool has_rows = int(threadIdx.x) / 32 * 16 < rows;  // this warp has rows
  const TileCopy<T, ROWS> copy_rows(row_of);
  const TileCopy<T, TOKENS> copy_tokens([&](int token) {
    return token < tokens ? static_cast<const T*>(p.x) + batch.entry[from + token] * p.x_row : nullptr;
  });
  const auto load = [&](int step, int stage) {
    T* const tile = reinterpret_cast<T*>(memory + stage * BYTES);
    const int64_t column = begin + int64_t(step) * RANKS;
    copy_rows(tile, column, end, p.x);
    copy_tokens(tile + ROWS * RANKS, column, end, p.x);
  };
#pragma unroll
  for (auto& sum : sums) sum[0] = sum[1] = sum[2] = sum[3] = 0;
  pipelined<STAGES>(steps, load, [&](int, int stage) {
    T* const tile = reinterpret_cast<T*>(memory + stage * BYTES);
    if (has_rows) {
#pragma unroll
      for (int i = 0; i < 4; i++) multiply<T, TOKENS>(sums, tile, tile + ROWS * RANKS, i, tokens);
    }
  });
}

// h of a part of A's tile, 64 ranks of the adapter at position `from`
template <typename T, int TOKENS, int STAGES>
__device__ void shrink_tile(char* memory, const Batch& batch, const MultiLoRASmall& p, const MultiLoRASlice& s, int g,
                            int from, int first_rank, int part) {
  __shared__ int64_t rows[ROWS / PAGE];  // where its pages begin
  const int slot = batch.slot[from], rank = batch.rank[from], count = batch.until[from] - from;
  if (threadIdx.x < ROWS / PAGE) {
    const int at = first_rank / PAGE + int(threadIdx.x);
    rows[threadIdx.x] = at * PAGE < rank ? int64_t(s.table[slot * s.pages + at]) * PAGE : 0;
  }
  __syncthreads();  // and the stages of the item before have been read
  float sums[TOKENS / 8][4];
  const int64_t begin = part * p.a_part, end = min(p.k, begin + p.a_part);
  const T* const a = static_cast<const T*>(s.a);
  mainloop<T, TOKENS, STAGES>(sums, memory, batch, p, from, count, begin, end, rank - first_rank, [&](int r) {
    return first_rank + r < rank ? a + (rows[r / PAGE] + r % PAGE) * s.a_row : nullptr;
  });
  const float scale = s.scale[slot];
  float* const h = p.h + ((part * p.slices + g) * p.m + from) * p.ranks;
  for_each_accumulator(sums, [&](int r, int token, float sum) {
    const int at = first_rank + threadIdx.x / 32 * 16 + r;
    if (token < count) h[token * p.ranks + at] = at < rank ? scale * sum : 0.f;
  });
}

// h of all tokens with ranks from `first` on, as two tiles of bfloat16: the numbers and their rest
template <int TOKENS>
__device__ void load_h(__nv_bfloat16* tile, __nv_bfloat16* rest, const Batch& batch, const MultiLoRASmall& p, int g,
                       int first, int parts) {
  for (int i = threadIdx.x; i < TOKENS * 8; i += THREADS) {
    const int token = i / 8, c = i % 8;
    float v[8] = {};
    if (token < p.m && batch.rank[token] > first) {
      for (int part = 0; part < parts; part++) {
        float more[8];
        load_eight(more, p.h + ((int64_t(part) * p.slices + g) * p.m + token) * p.ranks + first + c * 8, 8, true);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] += more[j];
      }
    }
    alignas(16) __nv_bfloat16 high[8], low[8];
#pragma unroll
    for (int j = 0; j < 8; j++) split(v[j], high[j], low[j]);
    *reinterpret_cast<uint4*>(piece(tile, token, c)) = *reinterpret_cast<uint4*>(high);
    *reinterpret_cast<uint4*>(piece(rest, token, c)) = *reinterpret_cast<uint4*>(low);
  }
}

// sums += B h of 16 ranks for positions `from` to `until`; the others' sums stay, whatever B is
template <typename T, int TOKENS>
__device__ void multiply_b(float (&sums)[TOKENS / 8][4], T* b_tile, __nv_bfloat16* h_tile, __nv_bfloat16* h_rest,
                           int step, int from, int until) {
  constexpr bool HALF = std::is_same<T, __half>::value;
  using B = __nv_bfloat16;
  const int lane = threadIdx.x % 32;
  uint32_t raw[4], f[4], f_rest[4];
  ldmatrix_x4_trans(raw, piece(b_tile, step * 16 + lane / 16 * 8 + lane % 8, threadIdx.x / 32 * 2 + lane / 8 % 2));
#pragma unroll
  for (int i = 0; i < 4; i++) split(raw[i], f[i], f_rest[i], T());
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j += 2) {
    if (j * 8 >= until || j * 8 + 16 <= from) continue;
    uint32_t g[4], g_rest[4];
    const int row = j * 8 + lane / 16 * 8 + lane % 8, at = 2 * step + lane / 8 % 2;
    ldmatrix_x4(g, piece(h_tile, row, at));
    ldmatrix_x4(g_rest, piece(h_rest, row, at));
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float (&sum)[4] = sums[j + i];
      const float before[4] = {sum[0], sum[1], sum[2], sum[3]};
      mma_m16n8k16<B>(sum, f, g[2 * i], g[2 * i + 1]);
      mma_m16n8k16<B>(sum, f, g_rest[2 * i], g_rest[2 * i + 1]);
      if (HALF) mma_m16n8k16<B>(sum, f_rest, g[2 * i], g[2 * i + 1]);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int token = (j + i) * 8 + lane % 4 * 2 + e % 2;
        if (token < from || token >= until) sum[e] = before[e];
      }
    }
  }
}

// y's columns of a tile of W: the sums of its parts, then what the adapters add
template <typename T, int TOKENS, int STAGES>
__device__ void epilogue_y(char* memory, const Batch& batch, const MultiLoRASmall& p, const MultiLoRASlice& s, int g,
                           int64_t row, int64_t scratch, int w_parts) {
  using B = __nv_bfloat16;
  __shared__ int heads[MAX_TOKENS], pages[MAX_TOKENS * RANKS / PAGE];
  __shared__ int head_count;
  float sums[TOKENS / 8][4];
  reduce_split_k<THREADS>(sums, p.scratch, scratch, w_parts);
  B *const h_tile = reinterpret_cast<B*>(memory), *const h_rest = h_tile + TOKENS * RANKS;
  T* const stages = reinterpret_cast<T*>(h_rest + TOKENS * RANKS);
  const int a_parts = int((p.k + p.a_part - 1) / p.a_part);
  const T* const b = static_cast<const T*>(s.b) + row;
  for (int first = 0; first < p.ranks; first += RANKS) {
    __syncthreads();  // the tiles and the list have been read
    if (threadIdx.x < 32) {
      int found = 0;
      for (int half = 0; half < MAX_TOKENS; half += 32) {
        const int i = half + int(threadIdx.x);
        const bool head = batch.rank[i] > first && (i == 0 || batch.slot[i - 1] != batch.slot[i]);
        const unsigned all = __ballot_sync(0xffffffff, head);
        if (head) heads[found + __popc(all & ((1u << threadIdx.x) - 1))] = i;
        found += __popc(all);
      }
      if (threadIdx.x == 0) head_count = found;
    }
    __syncthreads();
    const int steps = head_count;
    if (steps == 0) break;
    for (int i = threadIdx.x; i < steps * (RANKS / PAGE); i += THREADS) {
      const int head = heads[i / (RANKS / PAGE)], at = first / PAGE + i % (RANKS / PAGE);
      pages[i] = at * PAGE < batch.rank[head] ? s.table[batch.slot[head] * s.pages + at] : 0;
    }
    __syncthreads();
    const auto load = [&](int step, int stage) {
      const int rank = batch.rank[heads[step]] - first;
      const int* const of_step = pages + step * (RANKS / PAGE);
      const TileCopy<T, ROWS> copy(
          [&](int r) { return r < rank ? b + (int64_t(of_step[r / PAGE]) * PAGE + r % PAGE) * s.b_row : nullptr; });
      copy(stages + stage * ROWS * RANKS, 0, s.n - row, b);
    };
    const auto load_h_tile = [&] { load_h<TOKENS>(h_tile, h_rest, batch, p, g, first, a_parts); };
    pipelined<STAGES>(steps, load, load_h_tile, [&](int step, int stage) {
      const int head = heads[step], sixteens = (min(batch.rank[head] - first, RANKS) + 15) / 16;
#pragma unroll 1
      for (int i = 0; i < sixteens; i++) {
        multiply_b<T, TOKENS>(sums, stages + stage * ROWS * RANKS, h_tile, h_rest, i, head, batch.until[head]);
      }
    });
  }
  T* const tile = reinterpret_cast<T*>(memory);
  __syncthreads();  // the tiles have been read
  for_each_accumulator(sums, [&](int r, int token, float sum) {
    const int column = threadIdx.x / 32 * 16 + r;
    if (token < p.m && row + column < s.n) {
      const int slot = batch.slot[token], flags = slot < 0 ? 0 : s.flags[slot];
      const int64_t at = int64_t(flags >> 2) * s.n + row + column;
      if (flags & 1) sum *= s.gain[at];
      if (flags & 2) sum += s.more[at];
      if (p.bias.data) sum += p.bias[s.first + row + column];
    }
    piece(tile, token, column / 8)[column % 8] = rounded<T>(sum);
  });
  __syncthreads();
  T* const y = static_cast<T*>(p.y) + s.first + row;
  for (int i = threadIdx.x; i < TOKENS * 8; i += THREADS) {
    const int token = i / 8, c = i % 8;
    if (token < p.m && row + c * 8 < s.n) {
      *reinterpret_cast<uint4*>(y + batch.entry[token] * p.y_row +
                                c * 8) = *reinterpret_cast<uint4*>(piece(tile, token, c));
    }
  }
}

__device__ inline int tile_count(const MultiLoRASlice& s) { return int((s.n + ROWS - 1) / ROWS); }

template <typename T, int TOKENS, int STAGES, int B_STAGES>
__device__ void multi_lora_small(const MultiLoRASmall& p) {
  extern __shared__ uint4 shared[];
  char* const memory = reinterpret_cast<char*>(shared);
  __shared__ Batch batch;
  read_entries(batch, p);
  const int of_a = int(p.slices * p.a_blocks), a_parts = int((p.k + p.a_part - 1) / p.a_part),
            w_parts = int((p.k + p.w_part - 1) / p.w_part);
  const bool is_a = int(blockIdx.x) < of_a;
  const int first = tile_count(p.slice[0]), second = first + tile_count(p.slice[1]);  // before a slice's
  int g, block = blockIdx.x;
  if (is_a) {
    g = block / int(p.a_blocks), block %= int(p.a_blocks);
  } else {
    block -= of_a, g = (block >= first * w_parts) + (block >= second * w_parts);
  }
  const int before = g == 0 ? 0 : g == 1 ? first : second;
  if (!is_a) block -= before * w_parts;
  const MultiLoRASlice s = slice_of(p, g);
  int *const of_slice = p.tickets + g, *const of_tiles = p.tickets + MAX_SLICES + before;
  const int tile = block / w_parts;
  int a_tiles;
  if (is_a) {
    a_tiles = read_slots(batch, p, s);
    int items = 0;
    for (int item = block; item < a_tiles * a_parts; item += int(p.a_blocks), items++) {
      const int mine = item / a_parts;
      int from = 0;
      while (batch.tiles[from] <= mine) from++;
      const int rank = (mine - (from == 0 ? 0 : batch.tiles[from - 1])) * ROWS;
      shrink_tile<T, TOKENS, STAGES>(memory, batch, p, s, g, from, rank, item % a_parts);
    }
    if (items == 0 || !is_last_block(of_slice, min(a_tiles * a_parts, int(p.a_blocks)))) return;
  } else {
    float sums[TOKENS / 8][4];
    const int64_t row = int64_t(tile) * ROWS, begin = block % w_parts * p.w_part, end = min(p.k, begin + p.w_part);
    const T* const w = static_cast<const T*>(p.w) + (s.first + row) * p.w_row;
    mainloop<T, TOKENS, STAGES>(sums, memory, batch, p, 0, int(p.m), begin, end, ROWS,
                                [&](int r) { return row + r < s.n ? w + r * p.w_row : nullptr; });
    store_partials<THREADS>(sums, p.scratch, int64_t(before + tile) * w_parts + block % w_parts);
    a_tiles = read_slots(batch, p, s);
    if (!is_last_block(of_tiles + tile, w_parts + (a_tiles > 0))) return;
  }
  // the tiles of W that this block ends: its own, or once h is complete all that wait for it alone
  __shared__ int ends[THREADS];
  const int until = is_a ? tile_count(s) : tile + 1;
  for (int from = is_a ? 0 : tile; from < until; from += THREADS) {
    const int mine = from + int(threadIdx.x);
    ends[threadIdx.x] = !is_a && mine == tile;
    if (is_a && mine < until && atom_inc_acq_rel(of_tiles + mine) == w_parts) {
      of_tiles[mine] = 0;
      ends[threadIdx.x] = 1;
    }
    __syncthreads();
    for (int i = 0; i < THREADS; i++) {
      if (ends[i]) {
        epilogue_y<T, TOKENS, B_STAGES>(memory, batch, p, s, g, int64_t(from + i) * ROWS,
                                        int64_t(before + from + i) * w_parts, w_parts);
      }
    }
    __syncthreads();
  }
}

}  // namespace lk

// a stage holds 8 KiB of W or A and the same columns of x; or 8 KiB of B beside two tiles of h
#define LK_SMALL(name, T, TOKENS, STAGES, B_STAGES)                                                                 \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 2) name(const __grid_constant__ lk::MultiLoRASmall p) { \
    lk::multi_lora_small<T, TOKENS, STAGES, B_STAGES>(p);                                                           \
  }
LK_SMALL(multi_lora_small_bf16_16, __nv_bfloat16, 16, 6, 7)
LK_SMALL(multi_lora_small_bf16_64, __nv_bfloat16, 64, 4, 6)
LK_SMALL(multi_lora_small_f16_16, __half, 16, 6, 7)
LK_SMALL(multi_lora_small_f16_64, __half, 64, 4, 6)

LK_TABLE(multi_lora_small, MultiLoRASmall, LK_KERNEL(multi_lora_small_bf16_16), LK_KERNEL(multi_lora_small_bf16_64),
         LK_KERNEL(multi_lora_small_f16_16), LK_KERNEL(multi_lora_small_f16_64))
