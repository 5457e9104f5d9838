// y = gain ⊙ z + bias with z = x Wᵀ + h Bᵀ and h = scale · x Aᵀ, for at most 64 tokens, in one
// launch that reads W, A and B once, however W lies. Bound by the bytes of W, so tokens are the
// narrow side of each product.
//
// A and W are one matrix to the grid: tiles of 64 rows, each shared by blocks that take a part of
// its depth. Nobody waits for another block. Whoever comes last to a tile ends it: of a tile of A,
// that is h; of a tile of W, y, for which the last block of A's comes, too. So it does not matter
// in which order blocks run, or how many of them do at once; and sums are added in the order of the
// parts, whoever does it.
#pragma once
#include "../common/pipeline.cuh"
#include "../common/split_k.cuh"
#include "../common/tokens.cuh"

namespace lk {

// k is a multiple of 8, of 16 where W is int8, of 32 where it is codes of 4 bits; rows of x, w and
// a begin at multiples of 16 bytes
struct LoRALinearSmall {
  const void *x, *w, *a, *b;   // [m, k] [n, k] [r, k] [n, r]
  void *y, *z;                 // [m, n]; z may be null
  float *h, *scratch;          // [m, r] [blocks, 64, tokens]
  int* tickets;                // [tiles of A and W, and 1 more], zero before and after
  Vector w_scale, bias, gain;  // [n]; the first only where W is int8
  int64_t m, n, k, r, x_row, w_row, a_row, b_row;
  int64_t a_part, w_part;  // how many columns a block takes of A, of W
  float scale;
};

constexpr int RANKS = 64;  // of a step of the product with B

template <typename T>
constexpr int COLUMNS = WIDTH / int(sizeof(T));

// how x lies beside a tile of W: tiles [tokens][64]
template <typename W>
constexpr Swizzle SWIZZLE = sizeof(W) == 1 ? Swizzle::PAIRS : Swizzle::EIGHT;

template <typename W, int TOKENS, typename T>
__device__ void copy_tokens(T* tile, const T* x, int64_t stride, int64_t tokens, int64_t column, int64_t columns) {
  constexpr int TILES = COLUMNS<W> / COLUMNS<T>, PIECES = TILES * TOKENS * 8;
#pragma unroll
  for (int first = 0; first < PIECES; first += THREADS) {
    const int i = first + int(threadIdx.x), c = i % 8, token = i / 8 % TOKENS, t = i / 8 / TOKENS;
    if (PIECES % THREADS != 0 && i >= PIECES) break;
    const int64_t at = column + (t * 8 + c) * 8;
    const bool inside = token < tokens && at < columns;
    cp_async(piece<SWIZZLE<W>>(tile + t * TOKENS * COLUMNS<T>, token, c), inside ? x + token * stride + at : x,
             inside ? PIECE : 0);
  }
}

// sums [16 rows of a tile][tokens] += tile · tokensᵀ over 32 columns of int8. A column of the
// product is any number of W's row and the same of x's: a lane takes four that are neighbours.
// widened(four, i, low, high) makes pairs of T of four numbers of the lane's row, or of the eighth
// after it.
template <typename T, int TOKENS, typename Widened>
__device__ void multiply_int8(float (&sums)[TOKENS / 8][4], int8_t* w_tile, T* x_tile, int step, int tokens,
                              const Widened& widened) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
  uint32_t bytes[4];
  ldmatrix_x4(bytes, piece(w_tile, row, 2 * step + lane / 16));
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t f[4];
    widened(bytes[2 * half], 0, f[0], f[2]);
    widened(bytes[2 * half + 1], 1, f[1], f[3]);
    const int sixteen = 2 * step + half;
    T* const at = x_tile + sixteen / 4 * TOKENS * COLUMNS<T>;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
      if (j * 8 >= tokens) break;
      const T* const four = piece<SWIZZLE<int8_t>>(at, j * 8 + lane / 4, sixteen % 4 * 2 + lane % 4 / 2) + lane % 2 * 4;
      const uint2 g = *reinterpret_cast<const uint2*>(four);
      mma_m16n8k16<T>(sums[j], f, g.x, g.y);
    }
  }
}

// int8 numbers as they are
template <typename T>
struct Exact {
  __device__ void operator()(uint32_t four, int, uint32_t& low, uint32_t& high) const { widen(four, low, high, T()); }
};

// sums = rows of w [rows, k] · xᵀ over columns `begin` to `end`
template <typename W, typename T, int TOKENS, int STAGES, typename Widened = Exact<T>>
__device__ void mainloop(float (&sums)[TOKENS / 8][4], char* memory, const W* w, int64_t w_row, int64_t row,
                         int64_t rows, const LoRALinearSmall& p, int64_t begin, int64_t end,
                         const Widened& widened = Widened()) {
  constexpr int W_BYTES = ROWS * WIDTH, BYTES = W_BYTES + COLUMNS<W> / COLUMNS<T> * TOKENS * WIDTH;
  const int steps = int((end - begin + COLUMNS<W> - 1) / COLUMNS<W>), tokens = int(p.m);
  const auto w_tile = [&](int stage) { return reinterpret_cast<W*>(memory + stage * BYTES); };
  const auto x_tile = [&](int stage) { return reinterpret_cast<T*>(memory + stage * BYTES + W_BYTES); };
  const auto load = [&](int step, int stage) {
    const int64_t column = begin + int64_t(step) * COLUMNS<W>;
    copy_tile<THREADS, ROWS>(w_tile(stage), w, w_row, row, rows, column, end);
    copy_tokens<W, TOKENS>(x_tile(stage), static_cast<const T*>(p.x), p.x_row, p.m, column, end);
  };
#pragma unroll
  for (auto& sum : sums) sum[0] = sum[1] = sum[2] = sum[3] = 0;
  pipelined<STAGES>(steps, load, [&](int, int stage) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (sizeof(W) == 1) multiply_int8<T, TOKENS>(sums, w_tile(stage), x_tile(stage), i, tokens, widened);
      else multiply<T, TOKENS>(sums, w_tile(stage), x_tile(stage), i, tokens);
    }
  });
}

// h's columns of a tile of A
template <int TOKENS>
__device__ void epilogue_h(const LoRALinearSmall& p, int64_t row, int64_t first, int parts) {
  float sums[TOKENS / 8][4];
  reduce_split_k<THREADS>(sums, p.scratch, first, parts);
  for_each_accumulator(sums, [&](int r, int token, float sum) {
    const int64_t rank = row + threadIdx.x / 32 * 16 + r;
    if (rank < p.r && token < p.m) p.h[token * p.r + rank] = p.scale * sum;
  });
}

// 64 columns of y, or of z
template <typename T, int TOKENS>
__device__ void store(const LoRALinearSmall& p, T* tile, void* to, const float (&sums)[TOKENS / 8][4], int64_t row) {
  __syncthreads();  // the tile has been read
  for_each_accumulator(sums, [&](int r, int token, float sum) {
    const int column = threadIdx.x / 32 * 16 + r;
    piece(tile, token, column / 8)[column % 8] = rounded<T>(sum);
  });
  __syncthreads();
  T* const out = static_cast<T*>(to);
  if (p.n % 8 == 0) {
    for (int i = threadIdx.x; i < TOKENS * 8; i += THREADS) {
      const int token = i / 8, c = i % 8;
      if (token < p.m && row + c * 8 < p.n) {
        *reinterpret_cast<uint4*>(out + token * p.n + row + c * 8) = *reinterpret_cast<uint4*>(piece(tile, token, c));
      }
    }
  } else {
    for (int i = threadIdx.x; i < TOKENS * ROWS; i += THREADS) {
      const int token = i / ROWS, c = i % ROWS;
      if (token < p.m && row + c < p.n) out[token * p.n + row + c] = piece(tile, token, c / 8)[c % 8];
    }
  }
}

// y's columns of a tile of W, which are still to be multiplied with w_scale where SCALED
template <bool SCALED, typename T, int TOKENS>
__device__ void epilogue_y(const LoRALinearSmall& p, char* memory, int64_t row, int64_t first, int parts) {
  constexpr bool HALF = std::is_same<T, __half>::value;
  float sums[TOKENS / 8][4];
  reduce_split_k<THREADS>(sums, p.scratch, first, parts);
  const int64_t mine = row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;  // and eight rows on
  const auto load_rows_of = [&](const Vector& v, float none, float (&values)[2]) {
    for (int i = 0; i < 2; i++) values[i] = v.data && mine + 8 * i < p.n ? v[mine + 8 * i] : none;
  };
  float w_scale[2], gain[2], bias[2];
  load_rows_of(p.w_scale, 1, w_scale);
  load_rows_of(p.gain, 1, gain);
  load_rows_of(p.bias, 0, bias);
  if constexpr (SCALED) {
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
      for (int i = 0; i < 4; i++) sums[j][i] *= w_scale[i / 2];
    }
  }
  // float16 has too few exponents for what a number leaves: both sides become two of bfloat16
  using B = __nv_bfloat16;
  B *const b_tile = reinterpret_cast<B*>(memory), *const b_rest = HALF ? b_tile + ROWS * RANKS : nullptr;
  B *const h_tile = b_tile + 2 * ROWS * RANKS, *const h_rest = h_tile + TOKENS * RANKS;
  for (int64_t rank = 0; rank < p.r; rank += RANKS) {
    const int steps = int(min(p.r - rank + 15, int64_t(RANKS)) / 16);
    __syncthreads();  // the tiles have been read
    split_tile<THREADS, ROWS>(b_tile, b_rest, static_cast<const T*>(p.b), p.b_row, row, p.n, rank, p.r, steps);
    split_tile<THREADS, TOKENS>(h_tile, h_rest, p.h, p.r, 0, p.m, rank, p.r, steps);
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
      multiply<B, TOKENS>(sums, b_tile, h_tile, i, int(p.m));
      multiply<B, TOKENS>(sums, b_tile, h_rest, i, int(p.m));
      if (HALF) multiply<B, TOKENS>(sums, b_rest, h_tile, i, int(p.m));
    }
  }
  T* const tile = reinterpret_cast<T*>(memory);
  if (p.z) store<T, TOKENS>(p, tile, p.z, sums, row);
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j++) {
    for (int i = 0; i < 4; i++) sums[j][i] = gain[i / 2] * sums[j][i] + bias[i / 2];
  }
  store<T, TOKENS>(p, tile, p.y, sums, row);
}

// sum_part(sums, memory, is_a, row, begin, end) gives the sums of a tile's rows from `row` on, over
// columns `begin` to `end`
template <bool SCALED, typename T, int TOKENS, typename SumPart>
__device__ void lora_linear_small(const LoRALinearSmall& p, const SumPart& sum_part) {
  extern __shared__ uint4 shared[];
  char* const memory = reinterpret_cast<char*>(shared);
  const int a_tiles = int((p.r + ROWS - 1) / ROWS), w_tiles = int((p.n + ROWS - 1) / ROWS);
  const int a_parts = max(1, int((p.k + p.a_part - 1) / p.a_part)),
            w_parts = max(1, int((p.k + p.w_part - 1) / p.w_part));
  const int a_blocks = a_tiles * a_parts, block = int(blockIdx.x) < a_blocks ? blockIdx.x : blockIdx.x - a_blocks;
  const bool is_a = int(blockIdx.x) < a_blocks;
  const int tile = block / (is_a ? a_parts : w_parts), part = block % (is_a ? a_parts : w_parts);
  float sums[TOKENS / 8][4];
  const int64_t row = int64_t(tile) * ROWS, begin = int64_t(part) * (is_a ? p.a_part : p.w_part);
  const int64_t end = min(p.k, begin + (is_a ? p.a_part : p.w_part));
  sum_part(sums, memory, is_a, row, begin, end);
  store_partials<THREADS>(sums, p.scratch, blockIdx.x);
  // which tiles of W this block ends: its own, or once h is complete those that wait for nothing
  // else
  int from = tile, until = tile + 1;
  if (is_a) {
    if (!is_last_block(p.tickets + tile, a_parts)) return;
    epilogue_h<TOKENS>(p, row, int64_t(tile) * a_parts, a_parts);
    if (!is_last_block(p.tickets + a_tiles + w_tiles, a_tiles)) return;
    from = 0, until = w_tiles;
  } else if (!is_last_block(p.tickets + a_tiles + tile, w_parts + 1)) {
    return;
  }
  __shared__ int ends[THREADS];
  for (; from < until; from += THREADS) {
    const int mine = from + int(threadIdx.x);
    ends[threadIdx.x] = !is_a && mine == tile;
    if (is_a && mine < w_tiles && atom_inc_acq_rel(p.tickets + a_tiles + mine) == w_parts) {
      p.tickets[a_tiles + mine] = 0;
      ends[threadIdx.x] = 1;
    }
    __syncthreads();
    for (int i = 0; i < THREADS; i++) {
      const int64_t parts = int64_t(a_blocks) + int64_t(from + i) * w_parts;
      if (ends[i]) epilogue_y<SCALED, T, TOKENS>(p, memory, int64_t(from + i) * ROWS, parts, w_parts);
    }
    __syncthreads();
  }
}

}  // namespace lk
