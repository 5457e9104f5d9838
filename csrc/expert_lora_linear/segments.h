// How segments are shared among threads, and factors whose experts lie side by side.
#pragma once
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "params.h"

namespace lk {

inline int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// a matrix from a row and a column on; of a vector the row is 0
inline View part(View v, int64_t row, int64_t col) {
  if (v.data) v.data = static_cast<char*>(v.data) + (row * v.row + col * v.col) * size_of(v.type);
  return v;
}
inline View turned(View v) {
  std::swap(v.row, v.col);
  return v;
}
inline View at(const Stack& s, int64_t i) {
  View v = s.first;
  if (v.data) v.data = static_cast<char*>(v.data) + i * s.step * size_of(v.type);
  return v;
}

// An expert's W from one of its rows on, or of `back` products from a column on: numbers, or codes.
class Base {
 public:
  // `rows`: of an expert
  Base(const Stack& w, const Quantised* packed, int64_t expert, int64_t rows, bool back = false)
      : w_(packed ? w.first : at(w, expert)), coded_(packed), back_(back) {
    if (packed) codes_ = *packed, codes_.first += expert * rows;
  }
  Base from(int64_t n) const {
    Base b = *this;
    if (!coded_) b.w_ = part(w_, back_ ? 0 : n, back_ ? n : 0);
    else (back_ ? b.codes_.column : b.codes_.first) += n;
    return b;
  }
  const View& w() const { return w_; }
  const Quantised* packed() const { return coded_ ? &codes_ : nullptr; }

 private:
  View w_;
  Quantised codes_;
  bool coded_, back_;
};

// What one of the threads does: f(index of a segment, first column, end). The shares are of equal
// work, so a segment may be cut, at a multiple of `unit` columns. No sum depends on the cuts.
template <typename F>
void share_segments(const std::vector<Segment>& segments, int64_t columns, int64_t unit, int thread, int threads,
                    F&& f) {
  constexpr int64_t WEIGHT = 8;  // a weight comes from memory while so many tokens are computed
  const auto work = [](const Segment& s) { return s.last - s.first + WEIGHT; };
  int64_t total = 0, before = 0;
  for (const Segment& s : segments) total += work(s);
  const int64_t low = total * thread / threads, high = total * (thread + 1) / threads;
  const int64_t units = (columns + unit - 1) / unit;
  for (size_t i = 0; i < segments.size(); before += work(segments[i++])) {
    const int64_t size = work(segments[i]);
    const auto cut = [&](int64_t share) {
      return std::min(std::clamp<int64_t>(share - before, 0, size) * units / size * unit, columns);
    };
    const int64_t first = cut(low), last = cut(high);
    if (last > first) f(i, first, last);
  }
}

// Rows of a square of 16 bytes each become columns: each time, rows half the square apart interleave.
template <typename T>
struct Square {
  static constexpr int SIDE = 16 / sizeof(T);
  typedef T Row __attribute__((vector_size(16)));
  Row rows[SIDE];

  void transpose() {
    for (int side = 1; side < SIDE; side *= 2) {
      const Square s = *this;
      for (int i = 0; i < SIDE / 2; i++) {
        rows[2 * i] = interleaved<0>(s.rows[i], s.rows[i + SIDE / 2], std::make_index_sequence<SIDE>());
        rows[2 * i + 1] = interleaved<SIDE / 2>(s.rows[i], s.rows[i + SIDE / 2], std::make_index_sequence<SIDE>());
      }
    }
  }

 private:
  // elements of a and b in turn, from `FIRST` on
  template <size_t FIRST, size_t... J>
  static Row interleaved(Row a, Row b, std::index_sequence<J...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (FIRST + J / 2 + J % 2 * SIDE)...);
#else
    return __builtin_shuffle(a, b, Row{T(FIRST + J / 2 + J % 2 * SIDE)...});
#endif
  }
};

// The factors of the segments one after another, to be gathered from, or scattered to, those of all
// experts. Only where the experts are the last dimension in memory, as in PEFT's parameter of B, or
// that of its transpose: then one expert's numbers are some cache lines apart, and all of them move
// together.
class Gathered {
 public:
  Gathered(const Stack& all, int64_t rows, int64_t columns, int64_t experts, const std::vector<Segment>& segments)
      : all_(all), numbers_(rows * columns), experts_(experts), segments_(segments) {
    const View& v = all.first;
    const bool by_rows = v.col == experts && v.row == columns * experts;
    const bool by_columns = v.row == experts && v.col == rows * experts;
    if (!v.data || experts < 2 || all.step != 1 || !(by_rows || by_columns)) return;
    held_.reset(new char[size_t(numbers_ * int64_t(segments.size()) * size_of(v.type))]);
    own_ = {{held_.get(), by_rows ? columns : 1, by_rows ? 1 : rows, v.type}, numbers_};
  }
  bool apart() const { return held_ != nullptr; }
  View of(size_t segment) const { return apart() ? at(own_, int64_t(segment)) : at(all_, segments_[segment].expert); }
  void gather(int thread, int threads) const { move<false>(thread, threads); }
  void scatter(int thread, int threads) const { move<true>(thread, threads); }

 private:
  template <bool BACK>
  void move(int thread, int threads) const {
    if (!apart()) return;
    if (size_of(all_.first.type) == 4) return move<BACK, uint32_t>(thread, threads);
    return move<BACK, uint16_t>(thread, threads);
  }
  // numbers a block at a time, so that the lines of all experts stay in the first-level cache
  template <bool BACK, typename T>
  void move(int thread, int threads) const {
    constexpr int64_t BLOCK = 64;
    T *all = static_cast<T*>(all_.first.data), *own = static_cast<T*>(own_.first.data);
    const int64_t blocks = (numbers_ + BLOCK - 1) / BLOCK;
    const int64_t end = std::min(blocks * (thread + 1) / threads * BLOCK, numbers_);
    constexpr int64_t SIDE = Square<T>::SIDE;
    const int64_t count = int64_t(segments_.size());
    for (int64_t first = blocks * thread / threads * BLOCK; first < end; first += BLOCK) {
      const int64_t last = std::min(first + BLOCK, end);
      for (int64_t s = 0, some = 0; s < count; s += some) {
        const int64_t expert = segments_[size_t(s)].expert, next = s + SIDE - 1;
        T *of = all + expert, *to = own + s * numbers_;
        const bool side_by_side = next < count && segments_[size_t(next)].expert == expert + SIDE - 1;
        some = side_by_side ? SIDE : 1;
        int64_t i = first;
        for (; side_by_side && i + SIDE <= last; i += SIDE) move_square<BACK>(of + i * experts_, to + i);
        for (; i < last; i++) {
          for (int64_t j = 0; j < some; j++) {
            T &one = of[i * experts_ + j], &other = to[j * numbers_ + i];
            BACK ? one = other : other = one;
          }
        }
      }
    }
  }
  // as many numbers of as many experts
  template <bool BACK, typename T>
  void move_square(T* of, T* to) const {
    Square<T> square;
    T* const from = BACK ? to : of;
    const int64_t row = BACK ? numbers_ : experts_, to_row = BACK ? experts_ : numbers_;
    for (int i = 0; i < square.SIDE; i++) std::memcpy(&square.rows[i], from + i * row, 16);
    square.transpose();
    for (int i = 0; i < square.SIDE; i++) std::memcpy((BACK ? of : to) + i * to_row, &square.rows[i], 16);
  }

  Stack all_, own_;
  int64_t numbers_, experts_;
  const std::vector<Segment>& segments_;
  std::unique_ptr<char[]> held_;
};

}  // namespace lk
