// How many threads a call takes. A team is only as fast as its slowest thread: where another
// process holds a core, the others spin at a barrier until the scheduler gives the core back, for
// milliseconds, though one thread would have been through in microseconds. So teams are timed, and
// after two that stalled, calls that are shorter than the stall run on one thread for a while.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>

namespace lk {

class Team {
 public:
  Team() { std::fill(best_, best_ + BUCKETS, 0.4); }  // one token, W from memory in float32

  // nanoseconds by a clock that only grows
  static double now() {
    return double(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count());
  }

  // `work`: multiplications
  int size(double work, int threads, double time) const {
    if (work < ALONE) return 1;
    return time < until_ && alone(work) < stall_ ? 1 : threads;
  }

  // what a call took on `threads` threads
  void took(double work, int threads, double nanoseconds, double time) {
    double& best = best_[bucket(work)];
    const double share = best * work / threads;
    if (nanoseconds < 3 * share + SLACK) {
      best = std::min(best, nanoseconds * threads / work);
      pause_ = std::max(PAUSE, pause_ * 0.75);
      strikes_ = std::max(0, strikes_ - 1);
      return;
    }
    stall_ = std::max(stall_ / 2, nanoseconds - share);
    strikes_ = std::min(strikes_ + 1, 2);
    if (strikes_ < 2) return;
    until_ = time + pause_;
    pause_ = std::min(2 * pause_, LONGEST);
  }

 private:
  static constexpr double ALONE = 1 << 19;             // 30 µs: less than a team of sleepers takes to wake
  static constexpr double SLACK = 200e3;               // ns
  static constexpr double PAUSE = 2e8, LONGEST = 4e9;  // ns without a team
  static constexpr int BUCKETS = 48;

  static int bucket(double work) {
    int found = 0;
    for (uint64_t left = uint64_t(work); left > 1 && found < BUCKETS - 1; left /= 2) found++;
    return found;
  }
  double alone(double work) const { return best_[bucket(work)] * work; }

  double best_[BUCKETS] = {};  // ns of one thread for a multiplication, by log2 of the work
  double stall_ = 0, until_ = 0, pause_ = PAUSE;
  int strikes_ = 0;
};

}  // namespace lk
