// How many threads a call takes. A team is only as fast as its slowest thread: where another
// process holds a core, the others spin at a barrier until the scheduler gives the core back, for
// milliseconds, though one thread would have been through in microseconds. So teams are timed, and
// after two that stalled, calls that are shorter than the stall run on one thread for a while.
// What is slow for another reason looks the same: a W that no cache holds any more, codes in place of
// numbers. So the first call on one thread is timed, too. If that takes as long, no team had stalled.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <unordered_map>

namespace lk {

class Team {
 public:
  // nanoseconds by a clock that only grows
  static double now() {
    return double(
        std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count());
  }

  // Whether a team that has to wake would take longer than one thread.
  static bool is_little(double work) { return work < ALONE; }

  // `kind`: of the kernel and its dtype, whose calls take alike for a multiplication. `work`:
  // multiplications.
  int size(uint64_t kind, double work, int threads, double time) {
    if (is_little(work)) return 1;
    return time < until_ && speed(kind, work).best * work < stall_ ? 1 : threads;
  }

  // What a call took on `threads` threads. On one it is told of those that are not little.
  void took(uint64_t kind, double work, int threads, double nanoseconds, double time) {
    Speed& s = speed(kind, work);
    if (threads == 1) return check(s, nanoseconds / work);
    const double share = s.best * work / threads, rate = nanoseconds * threads / work;
    if (nanoseconds < s.allowed * share + SLACK) {
      s.best = std::min(s.best, rate);
      pause_ = std::max(PAUSE, pause_ * 0.75);
      strikes_ = std::max(0, strikes_ - 1);
      return;
    }
    stall_ = std::max(stall_ / 2, nanoseconds - share);
    // calls that are always so slow, and too long for one thread, are soon believed
    s.best = std::min(1.25 * s.best, rate);
    s.stalled = nanoseconds / work, s.team = threads;
    strikes_ = std::min(strikes_ + 1, 2);
    if (strikes_ < 2) return;
    until_ = time + pause_;
    pause_ = std::min(2 * pause_, LONGEST);
  }

 private:
  static constexpr double ALONE = 1 << 19;             // 30 µs: less than a team of sleepers takes to wake
  static constexpr double SLACK = 200e3;               // ns
  static constexpr double PAUSE = 2e8, LONGEST = 4e9;  // ns without a team
  static constexpr double TIMES = 3, MOST = 96;        // as long as the best is a stall
  static constexpr int BUCKETS = 64;

  // ns for a multiplication
  struct Speed {
    double best = 0.4;       // of one thread; one token, W from memory in float32
    double allowed = TIMES;  // times that of a team that did not stall
    double stalled = 0;      // of a team that seemed to, not of each thread, until it is checked
    int team = 1;            // its size
  };

  // by the kind and log2 of the work
  Speed& speed(uint64_t kind, double work) {
    uint64_t bucket = 0;
    for (uint64_t left = uint64_t(work); left > 1 && bucket < BUCKETS - 1; left /= 2) bucket++;
    return speeds_[kind * BUCKETS + bucket];
  }

  // One thread took `rate` for a multiplication where a team had seemed to stall.
  void check(Speed& s, double rate) {
    if (!s.stalled) return;
    if (rate < s.stalled) {
      s.best = std::min(s.best, rate);
      s.allowed = std::max(TIMES, s.allowed / 2);
    } else {
      s.best = std::max(s.best, s.stalled * s.team);
      s.allowed = std::min(2 * s.allowed, MOST);
      stall_ = 0, until_ = 0, pause_ = PAUSE, strikes_ = 0;
    }
    s.stalled = 0;
  }

  std::unordered_map<uint64_t, Speed> speeds_;
  double stall_ = 0, until_ = 0, pause_ = PAUSE;
  int strikes_ = 0;
};

}  // namespace lk
