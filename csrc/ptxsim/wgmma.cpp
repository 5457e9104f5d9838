// The matrix instructions of a warp group on sm_90. PTX ISA 9.7.15: wgmma.mma_async, its
// shared-memory descriptors and swizzles. Each warp computes its own 16 of the 64 rows, when
// wgmma.wait_group is reached (Options::late) or at once.
#include "block.h"
#include "numbers.h"

namespace lk::ptx {

namespace {

constexpr int ROWS = 16;  // of a warp

// 64 bits: start address, leading and stride offsets in units of 16 bytes, and the swizzle
struct Descriptor {
  // swizzle: bytes of a row that is exchanged, 0 for none
  uint32_t start, leading, stride, swizzle;
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

constexpr uint32_t K = 16, PIECE = 8;  // depth of a product; elements of 16 bytes
constexpr const char* NAMES[] = {"wgmma B", "wgmma A"};

// f(i, k, address) for each 16 bytes of an operand in shared memory, of elements from (i, k) on
template <typename F>
void each_piece(uint64_t descriptor, bool across, uint32_t first, uint32_t count, F&& f) {
  const Descriptor d(descriptor);
  const uint32_t step_i = across ? PIECE : 1, step_k = across ? 1 : PIECE;
  for (uint32_t i = 0; i < count; i += step_i) {
    for (uint32_t k = 0; k < K; k += step_k) f(i, k, d.address(first + i, k, across));
  }
}

// to[k][i] is element (first + i, k) of an operand in shared memory
void read_operand(Warp& w, uint64_t descriptor, bool across, bool bf16, uint32_t first, uint32_t count,
                  const char* what, std::vector<float>& to) {
  to.assign(count * K, 0.f);
  each_piece(descriptor, across, first, count, [&](uint32_t i, uint32_t k, uint32_t address) {
    const uint8_t* at = shared_at(w, 0, address, 16, Access::load, what);
    if (!at) return;
    uint16_t held[PIECE];
    std::memcpy(held, at, sizeof held);
    for (uint32_t e = 0; e < PIECE; e++) {
      to[(across ? k : k + e) * count + (across ? i + e : i)] = half_of(held[e], bf16);
    }
  });
}

// operands: D (n / 2 registers), A (4 registers or a descriptor), B's descriptor, whether D is
// added;
// immediates: n, whether bf16, whether A is in registers, signs of A and B, whether A and B run
// across
struct Product {
  const Instruction* in;
  uint64_t a, b;  // descriptors
  Mask added;
  bool begun = false;  // its bytes of shared memory are marked until it has read them

  // f(whether it is A, descriptor, whether across, first row, rows) for each operand in shared
  // memory
  template <typename F>
  void each_operand(const Warp& w, F&& f) const {
    if (!in->with[2]) f(true, a, in->with[5] != 0, uint32_t(w.index % 4) * ROWS, uint32_t(ROWS));
    f(false, b, in->with[6] != 0, 0u, uint32_t(in->with[0]));
  }
  void begin(Warp& w);
  void run(Warp& w) const;
};

// what it reads must be there, and be shown to its proxy, when it is issued, however late it runs
void Product::begin(Warp& w) {
  begun = w.block->launch->options.late;
  each_operand(w, [&](bool left, uint64_t d, bool across, uint32_t first, uint32_t count) {
    each_piece(d, across, first, count, [&](uint32_t, uint32_t, uint32_t address) {
      if (!shared_at(w, 0, address, 16, Access::load, NAMES[left])) return;
      if (!shown_to_proxy(w, 0, address, 16, NAMES[left])) return;
      if (begun) mark_travel(*w.block, address, 16, Travel::multiplies);
    });
  });
}

void Product::run(Warp& w) const {
  const auto n = uint32_t(in->with[0]);
  const bool bf16 = in->with[1], in_registers = in->with[2];
  const float sign = float(in->with[3]) * float(in->with[4]);
  std::vector<float> x(ROWS * K), y;
  if (in_registers) {
    for (int r = 0; r < 4; r++) {
      const uint32_t* v = w.at<uint32_t>(in->at[n / 2 + uint32_t(r)]);
      for (int i = 0; i < LANES; i++) {
        for (int e = 0; e < 2; e++) {
          const int row = i / 4 + r % 2 * 8, k = i % 4 * 2 + r / 2 * 8 + e;
          x[size_t(k * ROWS + row)] = half_of(uint16_t(v[i] >> (16 * e)), bf16);
        }
      }
    }
  }
  each_operand(w, [&](bool left, uint64_t d, bool across, uint32_t first, uint32_t count) {
    each_piece(d, across, first, count, [&](uint32_t, uint32_t, uint32_t address) {
      if (begun && address + 16 <= w.block->shared.size()) mark_travel(*w.block, address, 16, Travel::multiplied);
    });
    read_operand(w, d, across, bf16, first, count, NAMES[left], left ? x : y);
  });
  std::vector<float> sums(n);
  for (int m = 0; m < ROWS; m++) {
    const auto each_sum = [&](auto f) {  // f(column, register, lane) of this row
      for (int i = m % 8 * 4; i < m % 8 * 4 + 4; i++) {
        for (uint32_t r = 0; r < n / 2; r++) {
          if (int(r % 4 / 2) == m / 8) f(r / 4 * 8 + uint32_t(i % 4) * 2 + r % 2, r, i);
        }
      }
    };
    each_sum([&](uint32_t j, uint32_t r, int i) { sums[j] = added >> i & 1 ? w.at<float>(in->at[r])[i] : 0.f; });
    for (uint32_t k = 0; k < K; k++) {
      const float left = sign * x[k * ROWS + uint32_t(m)];
      for (uint32_t j = 0; j < n; j++) sums[j] += left * y[k * n + j];
    }
    each_sum([&](uint32_t j, uint32_t r, int i) { w.at<float>(in->at[r])[i] = sums[j]; });
  }
}

// marks the registers of products
void hold(Warp& w, const Products& products) {
  if (products.run.empty()) return;
  if (w.held.empty()) w.held.assign(w.block->launch->program->registers.size() / 4, FREE);
  for (const int32_t at : products.sums) w.held[size_t(at) / 4] |= SUM;
  for (const int32_t at : products.sources) w.held[size_t(at) / 4] |= SOURCE;
}

void issue(Warp& w, const Instruction& in, Mask mask) {
  if (mask != ALL) report(w, -1, "wgmma: not all lanes of the warp are here");
  const auto n = uint32_t(in.with[0]);
  const int32_t *at_a = in.at + n / 2, *at_b = at_a + (in.with[2] ? 4 : 1);
  Product product{&in, in.with[2] ? 0 : w.at<uint64_t>(at_a[0])[0], w.at<uint64_t>(at_b[0])[0], *w.at<Mask>(at_b[1])};
  w.block->launch->counters.mma++;
  product.begin(w);
  if (!w.block->launch->options.late) return product.run(w);
  w.products.run.push_back([product, &w] { product.run(w); });
  w.products.sums.insert(w.products.sums.end(), in.at, at_a);
  if (in.with[2]) w.products.sources.insert(w.products.sources.end(), at_a, at_b);
  hold(w, w.products);
}

void commit(Warp& w, const Instruction&, Mask) {
  w.committed_products.push_back(std::move(w.products));
  w.products = {};
}

void wait_group(Warp& w, const Instruction& in, Mask) {
  const Instruction* now = w.now;
  while (w.committed_products.size() > size_t(in.with[0])) {
    for (const auto& run : w.committed_products.front().run) run();
    w.committed_products.erase(w.committed_products.begin());
  }
  w.now = now;
  w.held.clear();
  hold(w, w.products);
  for (const Products& p : w.committed_products) hold(w, p);
  tick(w);
}

const Table entries{
    {"wgmma.mma_async", "*", issue, Flow::together},
    {"wgmma.fence", "=", nothing, Flow::none},
    {"wgmma.commit_group", "=", commit, Flow::together},
    {"wgmma.wait_group", "=i", wait_group, Flow::together},
};

}  // namespace

}  // namespace lk::ptx
