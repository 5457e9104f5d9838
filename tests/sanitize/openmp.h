// What the driver tells the parallel regions that openmp.cpp runs.
#pragma once

namespace lk::sanitize {

// barriers that thread 0 met in the last region
extern int barriers;
// which of them every thread passes without waiting: a bug on purpose; none if negative
extern int skipped;
// the thread that comes last to what lies before that barrier
extern int late;

}  // namespace lk::sanitize
