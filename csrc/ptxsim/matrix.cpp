// The matrix instructions of a warp. PTX ISA 9.7.14: mma, ldmatrix, stmatrix, movmatrix. Lane i has
// group g = i / 4 and place t = i % 4 in it. A register holds E elements that lie side by side in
// depth.
#include "block.h"
#include "numbers.h"

namespace lk::ptx {

namespace {

constexpr int ROWS = 16, COLUMNS = 8;

void need_all(Warp& w, Mask mask, const char* what) {
  if (mask != ALL) report(w, -1, std::string(what) + ": not all lanes of the warp are here");
}

// one element of a register
struct Bf16 {
  static constexpr int PER = 2;
  using Number = float;
  static float get(uint32_t r, int i) { return from_bf16(uint16_t(r >> (16 * i))); }
};
struct F16 {
  static constexpr int PER = 2;
  using Number = float;
  static float get(uint32_t r, int i) { return from_f16(uint16_t(r >> (16 * i))); }
};
struct Tf32 {
  static constexpr int PER = 1;
  using Number = float;
  // the low bits are not looked at
  static float get(uint32_t r, int) { return bits<float>(r & 0xffffe000u); }
};
struct S8 {
  static constexpr int PER = 4;
  using Number = int32_t;
  static int32_t get(uint32_t r, int i) { return int8_t(r >> (8 * i)); }
};
struct U8 {
  static constexpr int PER = 4;
  using Number = int32_t;
  static int32_t get(uint32_t r, int i) { return uint8_t(r >> (8 * i)); }
};

struct E4m3 {
  static constexpr int PER = 4;
  using Number = float;
  static float get(uint32_t r, int i) { return from_e4m3(uint8_t(r >> (8 * i))); }
};
struct E5m2 {
  static constexpr int PER = 4;
  using Number = float;
  static float get(uint32_t r, int i) { return from_e5m2(uint8_t(r >> (8 * i))); }
};

// D [16, 8] = A [16, K] B [K, 8] + C; operands D, A, B, C. Sums in the order of k, in the
// accumulator's type: the tensor cores' own order and rounding are not documented.
template <typename A, typename B, int K, bool HALF, bool SATURATES = false>
void mma(Warp& w, const Instruction& in, Mask mask) {
  using Number = typename A::Number;
  constexpr int E = A::PER, A_COUNT = ROWS * K / LANES / E, B_COUNT = COLUMNS * K / LANES / E, C_COUNT = HALF ? 2 : 4;
  need_all(w, mask, "mma");
  w.block->launch->counters.mma++;
  alignas(64) Number a[ROWS][K], b[K][COLUMNS], d[ROWS][COLUMNS];
  const int32_t *at_a = in.at + C_COUNT, *at_b = at_a + A_COUNT, *at_c = at_b + B_COUNT;
  for (int r = 0; r < A_COUNT; r++) {
    const uint32_t* v = w.at<uint32_t>(at_a[r]);
    for (int i = 0; i < LANES; i++) {
      for (int e = 0; e < E; e++) a[i / 4 + r % 2 * 8][i % 4 * E + r / 2 * 4 * E + e] = A::get(v[i], e);
    }
  }
  for (int r = 0; r < B_COUNT; r++) {
    const uint32_t* v = w.at<uint32_t>(at_b[r]);
    for (int i = 0; i < LANES; i++) {
      for (int e = 0; e < E; e++) b[i % 4 * E + r * 4 * E + e][i / 4] = B::get(v[i], e);
    }
  }
  for (int r = 0; r < C_COUNT; r++) {
    const uint32_t* v = w.at<uint32_t>(at_c[r]);
    for (int i = 0; i < LANES; i++) {
      if constexpr (HALF) {
        for (int e = 0; e < 2; e++) d[i / 4 + r * 8][i % 4 * 2 + e] = F16::get(v[i], e);
      } else {
        d[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2] = bits<Number>(v[i]);
      }
    }
  }
  if constexpr (SATURATES) {
    for (int m = 0; m < ROWS; m++) {
      for (int n = 0; n < COLUMNS; n++) {
        int64_t sum = d[m][n];
        for (int k = 0; k < K; k++) sum += int64_t(a[m][k]) * b[k][n];
        d[m][n] = Number(sum < INT32_MIN ? INT32_MIN : sum > INT32_MAX ? INT32_MAX : sum);
      }
    }
  } else {
    typedef Number Row __attribute__((vector_size(COLUMNS * sizeof(Number))));
    for (int m = 0; m < ROWS; m++) {
      Row sum;
      std::memcpy(&sum, d[m], sizeof sum);
      for (int k = 0; k < K; k++) {
        Row row;
        std::memcpy(&row, b[k], sizeof row);
        sum += a[m][k] * row;
      }
      std::memcpy(d[m], &sum, sizeof sum);
    }
  }
  for (int r = 0; r < C_COUNT; r++) {
    uint32_t* v = w.at<uint32_t>(in.at[r]);
    for (int i = 0; i < LANES; i++) {
      if constexpr (HALF) {
        v[i] = uint32_t(to_f16(d[i / 4 + r * 8][i % 4 * 2])) | uint32_t(to_f16(d[i / 4 + r * 8][i % 4 * 2 + 1])) << 16;
      } else {
        v[i] = bits<uint32_t>(d[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2]);
      }
    }
  }
}

// Matrices of 8 rows of 16 bytes, whose addresses are in lanes 8·m to 8·m + 7. Immediates: offset,
// bytes of the address register, matrices, whether transposed.
void row_addresses(const Warp& w, const Instruction& in, int32_t at, uint32_t (&to)[LANES]) {
  for (int i = 0; i < LANES; i++) {
    to[i] = uint32_t((in.with[1] == 8 ? w.at<uint64_t>(at)[i] : w.at<uint32_t>(at)[i]) + in.with[0]);
  }
}

// the two elements of lane i in a matrix: of row i / 4, or transposed of column i / 4
struct Pair {
  int row[2], column[2];
};
Pair pair_of(int lane, bool transposed) {
  const int g = lane / 4, t = lane % 4 * 2;
  return transposed ? Pair{{t, t + 1}, {g, g}} : Pair{{g, g}, {t, t + 1}};
}

void ldmatrix(Warp& w, const Instruction& in, Mask mask) {
  need_all(w, mask, "ldmatrix");
  const int count = int(in.with[2]);
  uint32_t a[LANES], found[4][LANES] = {};
  row_addresses(w, in, in.at[count], a);
  for (int m = 0; m < count; m++) {
    const uint8_t* rows[8];
    for (int i = 0; i < 8; i++) rows[i] = shared_at(w, m * 8 + i, a[m * 8 + i], 16, Access::load, "ldmatrix");
    count_shared(w, a, Mask{0xff} << (m * 8), 16);
    for (int i = 0; i < LANES; i++) {
      const Pair p = pair_of(i, in.with[3] != 0);
      for (int e = 0; e < 2; e++) {
        uint16_t value = 0;
        if (rows[p.row[e]]) std::memcpy(&value, rows[p.row[e]] + p.column[e] * 2, 2);
        found[m][i] |= uint32_t(value) << (16 * e);
      }
    }
  }
  for (int m = 0; m < count; m++) std::memcpy(w.at<uint32_t>(in.at[m]), found[m], sizeof found[m]);
}

void stmatrix(Warp& w, const Instruction& in, Mask mask) {
  need_all(w, mask, "stmatrix");
  const int count = int(in.with[2]);
  uint32_t a[LANES];
  row_addresses(w, in, in.at[0], a);
  for (int m = 0; m < count; m++) {
    uint16_t rows[8][8];
    const uint32_t* v = w.at<uint32_t>(in.at[1 + m]);
    for (int i = 0; i < LANES; i++) {
      const Pair p = pair_of(i, in.with[3] != 0);
      for (int e = 0; e < 2; e++) rows[p.row[e]][p.column[e]] = uint16_t(v[i] >> (16 * e));
    }
    count_shared(w, a, Mask{0xff} << (m * 8), 16);
    for (int i = 0; i < 8; i++) {
      uint8_t* to = shared_at(w, m * 8 + i, a[m * 8 + i], 16, Access::store, "stmatrix", rows[i]);
      if (to) std::memcpy(to, rows[i], 16);
    }
  }
}

void movmatrix(Warp& w, const Instruction& in, Mask mask) {
  need_all(w, mask, "movmatrix");
  uint16_t held[8][8];
  const uint32_t* v = w.at<uint32_t>(in.at[1]);
  for (int i = 0; i < LANES; i++) {
    for (int e = 0; e < 2; e++) held[i / 4][i % 4 * 2 + e] = uint16_t(v[i] >> (16 * e));
  }
  uint32_t* d = w.at<uint32_t>(in.at[0]);
  for (int i = 0; i < LANES; i++) d[i] = uint32_t(held[i % 4 * 2][i / 4]) | uint32_t(held[i % 4 * 2 + 1][i / 4]) << 16;
}

#define MMA(shape, types, operands, A, B, K, HALF) \
  {"mma." shape ".row.col." types, operands, mma<A, B, K, HALF>, Flow::together}
#define FOUR "32,32,32,32"

const Table entries{
    MMA("m16n8k16", "f32.bf16.bf16.f32", FOUR "=" FOUR ",32,32," FOUR, Bf16, Bf16, 16, false),
    MMA("m16n8k16", "f32.f16.f16.f32", FOUR "=" FOUR ",32,32," FOUR, F16, F16, 16, false),
    MMA("m16n8k16", "f16.f16.f16.f16", "32,32=" FOUR ",32,32,32,32", F16, F16, 16, true),
    MMA("m16n8k8", "f32.bf16.bf16.f32", FOUR "=32,32,32," FOUR, Bf16, Bf16, 8, false),
    MMA("m16n8k8", "f32.f16.f16.f32", FOUR "=32,32,32," FOUR, F16, F16, 8, false),
    MMA("m16n8k8", "f32.tf32.tf32.f32", FOUR "=" FOUR ",32,32," FOUR, Tf32, Tf32, 8, false),
    MMA("m16n8k4", "f32.tf32.tf32.f32", FOUR "=32,32,32," FOUR, Tf32, Tf32, 4, false),
    MMA("m16n8k32", "s32.s8.s8.s32", FOUR "=" FOUR ",32,32," FOUR, S8, S8, 32, false),
    MMA("m16n8k32", "s32.u8.u8.s32", FOUR "=" FOUR ",32,32," FOUR, U8, U8, 32, false),
    MMA("m16n8k32", "s32.s8.u8.s32", FOUR "=" FOUR ",32,32," FOUR, S8, U8, 32, false),
    MMA("m16n8k32", "s32.u8.s8.s32", FOUR "=" FOUR ",32,32," FOUR, U8, S8, 32, false),
    MMA("m16n8k32", "f32.e4m3.e4m3.f32", FOUR "=" FOUR ",32,32," FOUR, E4m3, E4m3, 32, false),
    MMA("m16n8k32", "f32.e4m3.e5m2.f32", FOUR "=" FOUR ",32,32," FOUR, E4m3, E5m2, 32, false),
    MMA("m16n8k32", "f32.e5m2.e4m3.f32", FOUR "=" FOUR ",32,32," FOUR, E5m2, E4m3, 32, false),
    MMA("m16n8k32", "f32.e5m2.e5m2.f32", FOUR "=" FOUR ",32,32," FOUR, E5m2, E5m2, 32, false),
    MMA("m16n8k16", "s32.s8.s8.s32", FOUR "=32,32,32," FOUR, S8, S8, 16, false),
    {"mma.m16n8k32.row.col.satfinite.s32.s8.s8.s32", FOUR "=" FOUR ",32,32," FOUR, mma<S8, S8, 32, false, true>,
     Flow::together},
    {"mma.m16n8k16.row.col.satfinite.s32.s8.s8.s32", FOUR "=32,32,32," FOUR, mma<S8, S8, 16, false, true>,
     Flow::together},
    {"ldmatrix", "*", ldmatrix, Flow::together},
    {"stmatrix", "*", stmatrix, Flow::together},
    {"movmatrix.sync.aligned.m8n8.trans.b16", "32=32", movmatrix, Flow::together},
};

}  // namespace

}  // namespace lk::ptx
