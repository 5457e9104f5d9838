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
      dequantise_rows(p.w, mine.first, mine.last - mine.first, 0, p.w.n_in, to + mine.first * p.to.row, p.to.row);
    });
  }
}

}  // namespace lk::LK_LEVEL
