// y = gain ⊙ (x Wᵀ + scale · x Aᵀ Bᵀ) + bias for at most 64 tokens in one launch (small.cuh), with
// W as codes: W = value(code) · scale(block) in float32, rounded once to the type of x. A tile of
// codes becomes numbers in registers just before its product, so that W is read as bytes, once.
//
// A code of 4 bits is a place in a table, which lies in 16 banks of shared memory: whatever 32
// lanes look up there, it takes one pass. Scales come with the codes, a word for each 32 of a row.
#include "../common/kernels.h"
#include "small.cuh"

namespace lk {

// Blocks, fewer than 2^31, count across rows and have 2^shift numbers, at least 32. A scale may be
// a code, too: outer_table[scales[i]] · outer[i >> outer_shift] + offset. int8 has layer.w_scale
// alone.
struct LoRALinearCodes {
  LoRALinearSmall layer;                      // w: two numbers a byte, the first high; or int8
  const float* table;                         // [16]
  const void* scales;                         // [blocks]; bytes where outer is given, or float
  const float *outer_table, *outer, *offset;  // [256] [blocks >> outer_shift] [1]; or null
  int64_t blocks, shift, outer_shift;
};

constexpr int CODES = 128, GROUP = 32;  // columns of a step; of a piece, which has one scale
constexpr int GROUPS = CODES / GROUP;
constexpr int CODE_BYTES = ROWS * CODES / 2, SCALE_BYTES = ROWS * GROUPS * 4;

__device__ inline uint32_t pair_of(float first, float second, __nv_bfloat16) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&two);
}
__device__ inline uint32_t pair_of(float first, float second, __half) {
  const __half2 two = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&two);
}

// 4 bytes of shared memory, of which `taken` come from memory and the rest is zero
__device__ inline void cp_async_word(void* to, const void* from, int taken) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(taken)
               : "memory");
}

// two rows of codes lie side by side in 128 bytes
__device__ inline uint8_t* code_piece(uint8_t* tile, int row, int at) {
  return piece(tile, row / 2, row % 2 * GROUPS + at);
}

// for eight lanes that read 16 bytes each, four neighbours of two rows
template <typename T>
__device__ T* token_piece(T* tile, int row, int at) {
  return tile + (row * WIDTH + (at ^ row % 2 * 4) * PIECE) / int(sizeof(T));
}

// numbers `first` and the next of eight
template <typename T>
__device__ uint32_t dequantised(uint32_t eight, int first, float scale, const float* table) {
  const uint32_t byte = eight >> first / 2 * 8;
  return pair_of(table[byte >> 4 & 15] * scale, table[byte & 15] * scale, T());
}

// sums [16 rows of a tile][tokens] += tile · tokensᵀ over 64 columns. A lane's eight codes of a row
// meet its eight numbers of a token; `scale` is that of the lane's piece, of its row and the eighth
// after it.
template <typename T, int TOKENS>
__device__ void multiply_codes(float (&sums)[TOKENS / 8][4], uint8_t* codes, T* x_tile, const float (&scale)[2],
                               const float* table, int step, int tokens) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
  uint32_t eight[4];
  ldmatrix_x4(eight, code_piece(codes, row, 2 * step + lane / 16));
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int owner = lane / 4 * 4 + 2 * step + half;  // of this piece's scales
    uint32_t f[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float of_row = __shfl_sync(~0u, scale[i], owner);
#pragma unroll
      for (int j = 0; j < 4; j++) f[j / 2][j % 2 * 2 + i] = dequantised<T>(eight[2 * half + i], 2 * j, of_row, table);
    }
    T* const at = x_tile + step * TOKENS * COLUMNS<T>;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
      if (j * 8 >= tokens) break;
      const uint4 g = *reinterpret_cast<const uint4*>(token_piece(at, j * 8 + lane / 4, half * 4 + lane % 4));
      mma_m16n8k16<T>(sums[j], f[0], g.x, g.y);
      mma_m16n8k16<T>(sums[j], f[1], g.z, g.w);
    }
  }
}

// What a thread copies of the rows `first_row` on, columns `begin` to `end`: of each step a piece
// of every 32nd row of codes with its scale, and of x every 16th token. Addresses differ by steps
// alone.
template <typename T, int TOKENS>
struct CodesCopy {
  static constexpr int EACH = ROWS * GROUPS / THREADS;
  static_assert(EACH * THREADS == ROWS * GROUPS && THREADS % GROUPS == 0 && CODES == 2 * COLUMNS<T>);

  const LoRALinearCodes& p;
  const int at = threadIdx.x / GROUPS, group = threadIdx.x % GROUPS, token = threadIdx.x / 8, piece = threadIdx.x % 8;
  const int columns;
  const uint8_t* codes[EACH];
  int64_t number[EACH];
  bool is_row[EACH];
  const T* x;

  __device__ CodesCopy(const LoRALinearCodes& p, int64_t first_row, int64_t begin, int64_t end)
      : p(p), columns(int(end - begin)) {
    const LoRALinearSmall& layer = p.layer;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int64_t row = first_row + at + i * (THREADS / GROUPS);
      is_row[i] = row < layer.n;
      codes[i] = static_cast<const uint8_t*>(layer.w) + row * layer.w_row + begin / 2 + group * PIECE;
      number[i] = row * layer.k + begin + group * GROUP;
    }
    x = static_cast<const T*>(layer.x) + token * layer.x_row + begin + piece * 8;
  }

  __device__ void operator()(uint8_t* code_tile, T* x_tile, char* words, int step) const {
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int row = at + i * (THREADS / GROUPS);
      const bool inside = is_row[i] && step * CODES + group * GROUP < columns;
      cp_async(code_piece(code_tile, row, group), codes[i] + step * (CODES / 2), inside ? PIECE : 0);
      const auto block = uint32_t((number[i] + step * CODES) >> p.shift);
      char* const word = words + (row * GROUPS + group) * 4;
      if (p.outer) {
        // the word that has the byte
        const uint32_t first = block & ~3u;
        cp_async_word(word, static_cast<const uint8_t*>(p.scales) + first,
                      inside ? min(uint32_t(p.blocks) - first, 4u) : 0);
        cp_async_word(word + SCALE_BYTES, p.outer + (block >> p.outer_shift), inside ? 4 : 0);
      } else {
        cp_async_word(word, static_cast<const float*>(p.scales) + block, inside ? 4 : 0);
      }
    }
#pragma unroll
    for (int i = 0; i < TOKENS; i += THREADS / 8) {
#pragma unroll
      for (int t = 0; t < CODES; t += COLUMNS<T>) {
        const bool inside = token + i < p.layer.m && step * CODES + t + piece * 8 < columns;
        cp_async(token_piece(x_tile + t * TOKENS, token + i, piece), x + i * p.layer.x_row + step * CODES + t,
                 inside ? PIECE : 0);
      }
    }
  }
};

// sums = rows of W · xᵀ over columns `begin` to `end`
template <typename T, int TOKENS, int STAGES>
__device__ void mainloop_of_codes(float (&sums)[TOKENS / 8][4], char* memory, const LoRALinearCodes& p, int64_t row,
                                  int64_t begin, int64_t end) {
  constexpr int X_BYTES = TOKENS * CODES * int(sizeof(T)), BYTES = CODE_BYTES + X_BYTES + 2 * SCALE_BYTES;
  __shared__ float table[16], outer_table[256];
  if (threadIdx.x < 16) table[threadIdx.x] = p.table[threadIdx.x];
  for (int i = threadIdx.x; p.outer && i < 256; i += THREADS) outer_table[i] = p.outer_table[i];
  const float offset = p.outer ? *p.offset : 0;
  const LoRALinearSmall& layer = p.layer;
  const auto x_tile = [&](int stage) { return reinterpret_cast<T*>(memory + stage * BYTES + CODE_BYTES); };
  const auto code_tile = [&](int stage) { return reinterpret_cast<uint8_t*>(memory + stage * BYTES); };
  const auto words = [&](int stage) { return memory + stage * BYTES + CODE_BYTES + X_BYTES; };
  const CodesCopy<T, TOKENS> copy(p, row, begin, end);
  const auto load = [&](int step, int stage) { copy(code_tile(stage), x_tile(stage), words(stage), step); };
  const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16 + lane / 4;  // and eight rows on
  uint32_t number[2];  // of the first of the lane's codes, of which only the bits of `byte` matter
#pragma unroll
  for (int i = 0; i < 2; i++) {
    number[i] = uint32_t((row + mine + 8 * i) * layer.k + begin + lane % GROUPS * GROUP);
  }
#pragma unroll
  for (auto& sum : sums) sum[0] = sum[1] = sum[2] = sum[3] = 0;
  pipelined<STAGES>(int((end - begin + CODES - 1) / CODES), load, [&](int step, int stage) {
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const char* const word = words(stage) + ((mine + 8 * i) * GROUPS + lane % GROUPS) * 4;
      scale[i] = *reinterpret_cast<const float*>(word);
      if (p.outer) {
        const uint32_t byte = (number[i] + uint32_t(step) * CODES) >> p.shift & 3;
        const float fine = outer_table[__float_as_uint(scale[i]) >> byte * 8 & 255];
        // rounded twice: the compiler would make one operation of it
        scale[i] = __fadd_rn(__fmul_rn(fine, *reinterpret_cast<const float*>(word + SCALE_BYTES)), offset);
      }
    }
#pragma unroll
    for (int i = 0; i < CODES / COLUMNS<T>; i++) {
      multiply_codes<T, TOKENS>(sums, code_tile(stage), x_tile(stage), scale, table, i, int(layer.m));
    }
  });
}

// int8 numbers times the scales of two rows, rounded
template <typename T>
struct Rounded {
  float scale[2];
  __device__ void operator()(uint32_t four, int row, uint32_t& low, uint32_t& high) const {
    const uint32_t biased = four ^ 0x80808080u;
    float f[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // 2^23 + what it was + 128
      const float number = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440u + uint32_t(i))) - 8388736.f;
      f[i] = number * scale[row];
    }
    low = pair_of(f[0], f[1], T());
    high = pair_of(f[2], f[3], T());
  }
};

struct Nibbles;

template <typename W, typename T, int TOKENS, int STAGES>
__device__ void lora_linear_codes(const LoRALinearCodes& p) {
  const LoRALinearSmall& layer = p.layer;
  const auto sum_part = [&](float (&sums)[TOKENS / 8][4], char* memory, bool is_a, int64_t row, int64_t begin,
                            int64_t end) {
    if (is_a) {
      mainloop<T, T, TOKENS, STAGES>(sums, memory, static_cast<const T*>(layer.a), layer.a_row, row, layer.r, layer,
                                     begin, end);
    } else if constexpr (std::is_same<W, Nibbles>::value) {
      mainloop_of_codes<T, TOKENS, STAGES>(sums, memory, p, row, begin, end);
    } else {
      const int64_t mine = row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
      Rounded<T> rounded;
      for (int i = 0; i < 2; i++) rounded.scale[i] = mine + 8 * i < layer.n ? layer.w_scale[mine + 8 * i] : 0;
      mainloop<W, T, TOKENS, STAGES>(sums, memory, static_cast<const W*>(layer.w), layer.w_row, row, layer.n, layer,
                                     begin, end, rounded);
    }
  };
  lora_linear_small<false, T, TOKENS>(layer, sum_part);
}

}  // namespace lk

#define LK_CODES(name, W, T, TOKENS, STAGES)                                                                         \
  extern "C" __global__ void __launch_bounds__(lk::THREADS, 2) name(const __grid_constant__ lk::LoRALinearCodes p) { \
    lk::lora_linear_codes<W, T, TOKENS, STAGES>(p);                                                                  \
  }
LK_CODES(lora_linear_codes_u4_bf16_16, lk::Nibbles, __nv_bfloat16, 16, 4)
LK_CODES(lora_linear_codes_u4_bf16_64, lk::Nibbles, __nv_bfloat16, 64, 3)
LK_CODES(lora_linear_codes_u4_f16_16, lk::Nibbles, __half, 16, 4)
LK_CODES(lora_linear_codes_u4_f16_64, lk::Nibbles, __half, 64, 3)
LK_CODES(lora_linear_codes_i8_bf16_16, int8_t, __nv_bfloat16, 16, 5)
LK_CODES(lora_linear_codes_i8_bf16_64, int8_t, __nv_bfloat16, 64, 3)
LK_CODES(lora_linear_codes_i8_f16_16, int8_t, __half, 16, 5)
LK_CODES(lora_linear_codes_i8_f16_64, int8_t, __half, 64, 3)

LK_TABLE(lora_linear_codes, LoRALinearCodes, LK_KERNEL(lora_linear_codes_u4_bf16_16),
         LK_KERNEL(lora_linear_codes_u4_bf16_64), LK_KERNEL(lora_linear_codes_u4_f16_16),
         LK_KERNEL(lora_linear_codes_u4_f16_64), LK_KERNEL(lora_linear_codes_i8_bf16_16),
         LK_KERNEL(lora_linear_codes_i8_bf16_64), LK_KERNEL(lora_linear_codes_i8_f16_16),
         LK_KERNEL(lora_linear_codes_i8_f16_64))
