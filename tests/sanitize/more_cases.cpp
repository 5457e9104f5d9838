// Calls of multi_lora and of the kernel on tiles.
#include "weights.h"

namespace lk::sanitize {

// Five kinds of entries: adapters in four slots, of several ranks and one of rank 0, and the base.
// Among many tokens there are stale ids and ones out of range, too.
void multi_lora_case(Case& c) {
  constexpr int64_t SLOTS = 4, PAGE = 8;
  const auto [tokens, n_in, n_out, rank] = c.shape;
  const int64_t k = c.coin() ? 2 : 1, pages = (std::max(rank, PAGE) + PAGE - 1) / PAGE, entries = tokens * k;
  const std::vector<int32_t> ranks{3, 0, int32_t(PAGE), int32_t(rank)}, generations{0, 7, 2, 5};
  // pages in memory from the last slot's on, backwards in each; the whole page of slot 2 comes last
  std::vector<int32_t> table(size_t(SLOTS * pages), 0);
  int32_t next = 0;
  for (const int64_t slot : {3, 0, 2}) {
    const int64_t count = (ranks[size_t(slot)] + PAGE - 1) / PAGE;
    for (int64_t i = count - 1; i >= 0; i--) table[size_t(slot * pages + i)] = next++;
  }
  const bool has_gain = c.coin(), has_more = c.coin();
  std::vector<int32_t> flags;
  for (int32_t slot = 0; slot < SLOTS; slot++) {
    flags.push_back(slot << 2 | (has_gain && slot != 1 ? 1 : 0) | (has_more ? 2 : 0));
  }
  std::vector<int64_t> ids, order, starts;
  bool any_bad = false;
  for (int64_t i = 0; i < entries; i++) {
    const int64_t slot = SLOTS - 1 - (entries - 1 - i) % (SLOTS + 1), bad = i % 11 == 10 ? i % 3 : 0;
    ids.push_back(slot < 0 ? -1
                           : (generations[size_t(slot)] + (bad == 1)) * (int64_t(1) << 32) + slot + (bad == 2) * 9);
    any_bad |= slot >= 0 && bad;
  }
  const auto slot_of = [&](int64_t entry) {
    const int64_t slot = ids[size_t(entry)] & 0xffffffff;
    return ids[size_t(entry)] < 0 || slot >= SLOTS ? SLOTS : slot;
  };
  for (int64_t slot = 0; slot <= SLOTS; slot++) {
    starts.push_back(int64_t(order.size()));
    for (int64_t i = 0; i < entries; i++) {
      if (slot_of(i) == slot) order.push_back(i);
    }
  }
  std::vector<float> scales, counts;
  for (int64_t i = 0; i < SLOTS; i++) scales.push_back(c.scale());
  for (int64_t i = 0; i < entries; i++) counts.push_back(float(c.numbers.real()));

  const DType small = c.any_type();
  Tensor x(c.numbers, c.type, tokens, n_in, c.by_rows());
  Tensor a(c.numbers, small, next * PAGE, n_in, c.by_rows()), b(c.numbers, small, next * PAGE, n_out, c.by_rows());
  Tensor from(c.numbers, c.type, tokens, n_out, c.by_rows());
  const std::vector<double> before = from.values();
  std::optional<Tensor> to, gain, more;
  if (c.coin()) to.emplace(c.type, tokens, n_out, c.by_rows());
  const std::optional<Tensor> bias = c.vector(n_out);
  const bool holds_bias = c.coin(), weighted = c.coin();
  if (has_gain) gain.emplace(c.numbers, DType::f32, SLOTS, n_out);
  if (has_more) more.emplace(c.numbers, DType::f32, SLOTS, n_out);
  const Table<int32_t> table_of(table), rank_of(ranks), flags_of(flags), generation_of(generations), error({0});
  const Table<int64_t> ids_of(ids), order_of(order, k == 1), starts_of(starts);
  const Table<float> scale_of(scales);
  std::optional<Table<float>> weights;
  if (weighted) weights.emplace(counts);
  const MultiLora p{x,
                    a,
                    b,
                    from,
                    to ? *to : from,
                    view_of(bias),
                    holds_bias,
                    table_of.data(),
                    rank_of.data(),
                    flags_of.data(),
                    generation_of.data(),
                    scale_of.data(),
                    gain ? gain->floats() : nullptr,
                    more ? more->floats() : nullptr,
                    ids_of.data(),
                    weighted ? weights->data() : nullptr,
                    order_of.data(),
                    starts_of.data(),
                    error.data(),
                    tokens,
                    k,
                    SLOTS,
                    pages,
                    n_in,
                    n_out,
                    c.threads};
  c.run([&] { c.level->multi_lora(p); });
  if (*error.data() != any_bad) throw std::runtime_error(c.said() + ": error is not that of the ids");
  // A x of every rank row
  const std::vector<double> hidden = product(x.values(), a.values(), n_in);
  c.expect(to ? *to : from, "to", [&](int64_t t, int64_t n) {
    const double shift = value_of(bias, n, 0), z = before[size_t(t * n_out + n)] - (holds_bias ? shift : 0);
    double sum = z + shift;
    for (int64_t i = t * k; i < (t + 1) * k; i++) {
      const int64_t slot = slot_of(i);
      if (slot == SLOTS || ids[size_t(i)] >> 32 != generations[size_t(slot)]) continue;
      double added = 0;
      for (int64_t j = 0; j < ranks[size_t(slot)]; j++) {
        const int64_t row = table[size_t(slot * pages + j / PAGE)] * PAGE + j % PAGE;
        added += b.at(row, n) * hidden[size_t(t * a.rows() + row)];
      }
      const double g = flags[size_t(slot)] & 1 ? gain->at(slot, n) : 1;
      added = (g - 1) * z + g * scales[size_t(slot)] * added + (has_more ? more->at(slot, n) : 0);
      sum += (weighted ? counts[size_t(i)] : 1) * added;
    }
    return sum;
  });
}

void tiles_case(Case& c) {
  const auto [tokens, n_in, n_out, drawn] = c.shape;
  // bf16, or float32 for the shapes drawn with the two other dtypes
  const DType x_type = c.type == DType::bf16 ? DType::bf16 : DType::f32, y_type = c.coin() ? DType::bf16 : DType::f32;
  const bool back = c.type == DType::f16 || c.coin(), has_rank = c.fixed || c.numbers.next() % 4,
             has_a = has_rank && c.coin();
  const int64_t rank = has_rank ? drawn : 0;
  Tensor x(c.numbers, x_type, tokens, n_in, c.any_layout());
  const Weight w(c, DType::bf16, back ? n_in : n_out, back ? n_out : n_in);
  Tensor y(y_type, tokens, n_out, c.by_rows());
  std::optional<Tensor> a, b, z, h, gain = c.vector(back ? n_in : n_out);
  std::optional<Tensor> bias = back ? std::optional<Tensor>() : c.vector(n_out);
  const Dropout dropout = back ? c.dropout() : Dropout{};
  if (has_a) a.emplace(c.numbers, c.any_type(), rank, n_in, c.any_layout());
  if (has_rank) b.emplace(c.numbers, c.any_type(), n_out, rank, c.any_layout());
  if (has_a) h.emplace(DType::f32, tokens, rank);
  else if (has_rank) h.emplace(c.numbers, DType::f32, tokens, rank);
  if (!back && c.coin()) z.emplace(y_type, tokens, n_out, c.by_rows());
  const float scale = c.scale();
  const Tiles p{
      x,     w,       view_of(a), view_of(b), y,    view_of(z), view_of(bias), view_of(gain), h ? h->floats() : nullptr,
      scale, dropout, back,       tokens,     n_in, n_out,      rank,          c.threads,     w.packed()};
  c.run([&] { c.level->tiles(p); });
  std::vector<double> left = x.values(), right = w.values();
  for (size_t i = 0; back && i < left.size(); i++) left[i] *= value_of(gain, int64_t(i) % n_in, 1);
  if (back) {
    for (int64_t n = 0; n < n_out; n++) {
      for (int64_t k = 0; k < n_in; k++) right[size_t(n * n_in + k)] = w.at(k, n);
    }
  }
  const std::vector<double> base = product(left, right, n_in);
  std::vector<double> hidden;
  if (has_a) {
    hidden = product(left, a->values(), n_in);
    for (double& v : hidden) v *= scale;
    c.expect(*h, "h", [&](int64_t t, int64_t j) { return hidden[size_t(t * rank + j)]; });
  } else if (has_rank) {
    hidden = h->values();
  }
  const std::vector<double> more = has_rank ? product(hidden, b->values(), rank) : std::vector<double>(base.size());
  const auto sum = [&](int64_t t, int64_t n) {
    return base[size_t(t * n_out + n)] + mask_of(dropout, t, n) * more[size_t(t * n_out + n)];
  };
  if (z) c.expect(*z, "z", sum);
  // without AMX dy ⊙ gain is one bf16 number
  c.expect(y, "y", back && gain && x_type == DType::bf16 ? DType::bf16 : y_type, [&](int64_t t, int64_t n) {
    return back ? sum(t, n) : value_of(gain, n, 1) * sum(t, n) + value_of(bias, n, 0);
  });
}

}  // namespace lk::sanitize
