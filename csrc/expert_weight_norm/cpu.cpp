// The norms of all experts in one parallel region: each thread takes rows of an equal share.
#include "cpu.h"

#include <omp.h>

#include "../expert_lora_linear/segments.h"

namespace lk {

void expert_norm(const Kernels& k, const ExpertNorm& p) {
  std::vector<Segment> all;
  for (int64_t e = 0; e < p.experts; e++) all.push_back({e, 0, 1});
  const Gathered b(p.b, p.n_out, p.rank, p.experts, all);
  // float32 and bf16 enter those products as a whole
  const bool tiles = k.tiles && p.w.first.type == DType::bf16 && p.a.first.type != DType::f16;
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    b.gather(thread, threads);
#pragma omp barrier
    std::vector<float> held;
    share_segments(all, p.n_out, 96, thread, threads, [&](size_t e, int64_t first, int64_t last) {
      const int64_t rows = last - first, at_first = int64_t(e) * p.n_out + first;
      const Base w = Base(p.w, p.packed, int64_t(e), p.n_out).from(first);
      const View a = at(p.a, int64_t(e));
      View products;  // A Wᵀ [rank, rows]
      if (tiles) {
        held.resize(size_t(p.rank * rows));
        products = {held.data(), rows, 1, DType::f32};
        k.tiles(
            {a, w.w(), {}, {}, products, {}, {}, {}, nullptr, 1.f, {}, false, p.rank, p.n_in, rows, 0, 1, w.packed()});
      }
      const View squared{p.w_squared ? const_cast<float*>(p.w_squared) + at_first : nullptr, 0, 1, DType::f32};
      k.weight_norm({w.w(), a, part(b.of(e), first, 0), squared, products, p.norm + at_first, p.scale, p.max_condition,
                     p.n_in, rows, p.rank, 1, w.packed()});
    });
  }
}

}  // namespace lk
