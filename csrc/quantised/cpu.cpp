// Rows of a quantised W in memory.
#include <omp.h>

#include "../common/dot.h"
#include "rows.h"

namespace lk::LK_LEVEL {

void dequantise(const Dequantise& p) {
#pragma omp parallel num_threads(p.threads)
  {
    const Range mine = share(p.rows, 1, omp_get_thread_num(), omp_get_num_threads());
    with_type(p.to, [&](auto* to) {
      for (int64_t i = mine.first; i < mine.last; i++) dequantise_row(p.w, i, 0, p.w.n_in, to + i * p.to.row);
    });
  }
}

}  // namespace lk::LK_LEVEL
