// The matrix instructions of a warp group on sm_90. PTX ISA 9.7.15: wgmma.mma_async, its shared-memory descriptors and
// swizzles. Each warp computes its own 16 of the 64 rows when it comes to the instruction: what is asynchronous on a GPU
// is done at once, so a result that is used before wgmma.wait_group is not noticed.
#include "block.h"
#include "numbers.h"

namespace lk::ptx {

namespace {

constexpr int ROWS = 16;  // of a warp

// 64 bits: start address, leading and stride offsets in units of 16 bytes, and the swizzle
struct Descriptor {
  uint32_t start, leading, stride, swizzle;  // swizzle: bytes of a row that is exchanged, 0 for none
  explicit Descriptor(uint64_t d)
      : start(uint32_t(d & 0x3fff) * 16),
        leading(uint32_t(d >> 16 & 0x3fff) * 16),
        stride(uint32_t(d >> 32 & 0x3fff) * 16) {
    const uint32_t widths[4] = {0, 128, 64, 32};
    swizzle = widths[d >> 62];
  }

  // of element (m, k) of 16 bits; `across`: m runs along memory instead of k
  uint32_t address(uint32_t m, uint32_t k, bool across) const {
    if (swizzle == 0) {
      // core matrices of 8 rows of 16 bytes
      return across ? start + m / 8 * stride + k / 8 * leading + k % 8 * 16 + m % 8 * 2
                    : start + m / 8 * stride + k / 8 * leading + m % 8 * 16 + k % 8 * 2;
    }
    const uint32_t along = swizzle / 2;  // elements of a row
    const uint32_t plain = across ? start + m / along * leading + k / 8 * stride + k % 8 * swizzle + m % along * 2
                                  : start + m / 8 * stride + m % 8 * swizzle + k * 2;
    // pieces of 16 bytes are exchanged by the number of their row of 128 bytes
    return plain ^ (plain >> 3 & (swizzle - 16) & 0x70);
  }
};

float half_of(uint16_t v, bool bf16) { return bf16 ? from_bf16(v) : from_f16(v); }

uint16_t element(Warp& w, const Descriptor& d, uint32_t m, uint32_t k, bool across, const char* what) {
  uint16_t value = 0;
  const uint8_t* at = shared_at(w, 0, d.address(m, k, across), 2, Access::load, what);
  if (at) std::memcpy(&value, at, 2);
  return value;
}

// operands: D (n / 2 registers), A (4 registers or a descriptor), B's descriptor, whether D is added;
// immediates: n, whether bf16, whether A is in registers, signs of A and B, whether A and B run across
void wgmma(Warp& w, const Instruction& in, Mask mask) {
  if (mask != ALL) report(w, -1, "wgmma: not all lanes of the warp are here");
  const auto n = uint32_t(in.with[0]);
  const bool bf16 = in.with[1], in_registers = in.with[2];
  const float sign = float(in.with[3]) * float(in.with[4]);
  const int32_t *at_a = in.at + n / 2, *at_b = at_a + (in_registers ? 4 : 1);
  constexpr int K = 16;
  const uint32_t row0 = uint32_t(w.index % 4) * ROWS;
  float a[ROWS][K];
  if (in_registers) {
    for (int r = 0; r < 4; r++) {
      const uint32_t* v = w.at<uint32_t>(at_a[r]);
      for (int i = 0; i < LANES; i++) {
        for (int e = 0; e < 2; e++)
          a[i / 4 + r % 2 * 8][i % 4 * 2 + r / 2 * 8 + e] = half_of(uint16_t(v[i] >> (16 * e)), bf16);
      }
    }
  } else {
    const Descriptor d(w.at<uint64_t>(at_a[0])[0]);
    for (uint32_t m = 0; m < ROWS; m++) {
      for (uint32_t k = 0; k < K; k++) a[m][k] = half_of(element(w, d, row0 + m, k, in.with[5], "wgmma A"), bf16);
    }
  }
  const Descriptor d(w.at<uint64_t>(at_b[0])[0]);
  std::vector<float> b(n * K);
  for (uint32_t j = 0; j < n; j++) {
    for (uint32_t k = 0; k < K; k++) b[k * n + j] = half_of(element(w, d, j, k, in.with[6], "wgmma B"), bf16);
  }
  const Mask added = *w.at<Mask>(at_b[1]);
  std::vector<float> row(n);
  for (int m = 0; m < ROWS; m++) {
    const auto each_sum = [&](auto f) {  // f(column, register, lane) of this row
      for (int i = m % 8 * 4; i < m % 8 * 4 + 4; i++) {
        for (uint32_t r = 0; r < n / 2; r++) {
          if (int(r % 4 / 2) == m / 8) f(r / 4 * 8 + uint32_t(i % 4) * 2 + r % 2, r, i);
        }
      }
    };
    each_sum([&](uint32_t j, uint32_t r, int i) { row[j] = added >> i & 1 ? w.at<float>(in.at[r])[i] : 0.f; });
    for (int k = 0; k < K; k++) {
      const float x = sign * a[m][k];
      for (uint32_t j = 0; j < n; j++) row[j] += x * b[uint32_t(k) * n + j];
    }
    each_sum([&](uint32_t j, uint32_t r, int i) { w.at<float>(in.at[r])[i] = row[j]; });
  }
  w.block->launch->counters.mma++;
}

void nothing(Warp&, const Instruction&, Mask) {}

const Table entries{
    {"wgmma.mma_async", "*", wgmma, Flow::together},
    {"wgmma.fence", "=", nothing, Flow::none},
    {"wgmma.commit_group", "=", nothing, Flow::none},
    {"wgmma.wait_group", "=i", nothing, Flow::none},
};

}  // namespace

}  // namespace lk::ptx
