// What the lanes of a warp, and the warps of a block, do together.
// PTX ISA 9.7.9 shfl, 9.7.13 bar, barrier, vote, match, redux, activemask, elect, griddepcontrol.
#include "block.h"
#include "numbers.h"

namespace lk::ptx {

namespace {

// The lanes named in a member mask must be here; a lane that is not would be waited for, forever if
// it never comes.
void need(Warp& w, Mask mask, Mask members, const char* what) {
  members &= w.live;
  if (members & ~mask) report(w, -1, std::string(what) + ": lanes of its member mask are not here");
}
Mask members_of(const Warp& w, int32_t at, Mask mask) { return mask ? w.at<uint32_t>(at)[__builtin_ctz(mask)] : 0; }

// f(lanes) for the lanes of each member mask, which name themselves in it
template <typename F>
void by_members(Warp& w, int32_t at, Mask mask, const char* what, F&& f) {
  for (Mask left = mask; left;) {
    const Mask members = members_of(w, at, left);
    Mask here = 0;
    for (int i = 0; i < LANES; i++) {
      if (left >> i & 1 && w.at<uint32_t>(at)[i] == members) here |= Mask{1} << i;
    }
    need(w, here, members, what);
    if (here & ~members) report(w, -1, std::string(what) + ": a lane is not in its own member mask");
    f(here);
    left &= ~here;
  }
}

// shfl.sync: the result, whether the source lane is in range, value, lane or distance, clamp and
// segment, member mask
enum Mode { UP, DOWN, BUTTERFLY, INDEX };
template <Mode MODE>
void shuffle(Warp& w, const Instruction& in, Mask mask) {
  const uint32_t *x = w.at<uint32_t>(in.at[2]), *by = w.at<uint32_t>(in.at[3]), *c = w.at<uint32_t>(in.at[4]);
  const uint32_t* members = w.at<uint32_t>(in.at[5]);
  by_members(w, in.at[5], mask, "shfl", [](Mask) {});
  uint32_t to[LANES];
  Mask inside = 0;
  for (int i = 0; i < LANES; i++) {
    to[i] = x[i];
    if (!(mask >> i & 1)) continue;
    const int b = int(by[i] & 31), clamp = int(c[i] & 31), segment = int(c[i] >> 8 & 31);
    const int most = (i & segment) | (clamp & ~segment), least = i & segment;
    int j = 0;
    bool in_range = false;
    if (MODE == UP) j = i - b, in_range = j >= most;
    if (MODE == DOWN) j = i + b, in_range = j <= most;
    if (MODE == BUTTERFLY) j = i ^ b, in_range = j <= most;
    if (MODE == INDEX) j = least | (b & ~segment), in_range = j <= most;
    if (!in_range) j = i;
    if (!(mask >> j & 1)) report(w, i, "shfl: reads lane " + std::to_string(j) + ", which is not here");
    else if (!(members[i] >> j & 1))
      report(w, i, "shfl: reads lane " + std::to_string(j) + ", which is not in its member mask");
    to[i] = x[j];
    inside |= Mask(in_range) << i;
  }
  each(w.at<uint32_t>(in.at[0]), mask, [&](int i) { return to[i]; });
  Mask& p = *w.at<Mask>(in.at[1]);
  p = (p & ~mask) | (inside & mask);
}

// vote.sync: the result, the predicate, the member mask
template <typename F>
void vote(Warp& w, const Instruction& in, Mask mask, F&& f) {
  const Mask given = *w.at<Mask>(in.at[1]);
  Mask result = 0;
  by_members(w, in.at[2], mask, "vote", [&](Mask here) { result |= f(given & here, here) ? here : 0; });
  Mask& p = *w.at<Mask>(in.at[0]);
  p = (p & ~mask) | result;
}

void ballot(Warp& w, const Instruction& in, Mask mask) {
  const Mask given = *w.at<Mask>(in.at[1]);
  uint32_t* to = w.at<uint32_t>(in.at[0]);
  by_members(w, in.at[2], mask, "vote", [&](Mask here) { each(to, here, [&](int) { return given & here; }); });
}

// redux.sync: the result, the value, the member mask
template <typename T, typename F>
void redux(Warp& w, const Instruction& in, Mask mask, F&& f) {
  const T* x = w.at<T>(in.at[1]);
  T result[LANES] = {};
  by_members(w, in.at[2], mask, "redux", [&](Mask here) {
    T sum{};
    bool first = true;
    for (int i = 0; i < LANES; i++) {
      if (!(here >> i & 1)) continue;
      sum = first ? x[i] : f(sum, x[i]);
      first = false;
    }
    each(result, here, [&](int) { return sum; });
  });
  each(w.at<T>(in.at[0]), mask, [&](int i) { return result[i]; });
}

void elect(Warp& w, const Instruction& in, Mask mask) {
  const int leader = __builtin_ctz(mask ? mask : 1);
  each(w.at<uint32_t>(in.at[0]), mask, [&](int) { return uint32_t(leader); });
  Mask& p = *w.at<Mask>(in.at[1]);
  p = (p & ~mask) | (Mask{1} << leader & mask);
}

void active_mask(Warp& w, const Instruction& in, Mask mask) {
  each(w.at<uint32_t>(in.at[0]), mask, [&](int) { return mask; });
}

void warp_sync(Warp& w, const Instruction& in, Mask mask) {
  by_members(w, in.at[0], mask, "bar.warp.sync", [](Mask) {});
  tick(w);
}

// match.sync: the lanes that have the same value; of all, whether there is one alone. Operands end
// with value and mask
template <typename T>
void match_any(Warp& w, const Instruction& in, Mask mask) {
  const T* x = w.at<T>(in.at[1]);
  Mask found[LANES] = {};
  by_members(w, in.at[2], mask, "match", [&](Mask here) {
    for (int i = 0; i < LANES; i++) {
      for (int j = 0; j < LANES; j++) found[i] |= Mask(here >> i & here >> j & 1 && x[i] == x[j]) << j;
    }
  });
  each(w.at<uint32_t>(in.at[0]), mask, [&](int i) { return found[i]; });
}
template <typename T>
void match_all(Warp& w, const Instruction& in, Mask mask) {
  const T* x = w.at<T>(in.at[2]);
  Mask found[LANES] = {}, agree = 0;
  by_members(w, in.at[3], mask, "match", [&](Mask here) {
    const T first = x[__builtin_ctz(here)];
    for (int i = 0; i < LANES; i++) {
      if (here >> i & 1 && x[i] != first) return;
    }
    agree |= here;
    each(found, here, [&](int) { return here; });
  });
  each(w.at<uint32_t>(in.at[0]), mask, [&](int i) { return found[i]; });
  Mask& p = *w.at<Mask>(in.at[1]);
  p = (p & ~mask) | agree;
}

// bar: the immediates are the barrier and the threads it waits for, 0 for all; -1 if a register
// says so bar.red: the first operands are the result and the predicate, the third immediate is what
// is made of the predicates
void barrier(Warp& w, const Instruction& in, Mask mask, bool waits, bool reduces = false) {
  int at = reduces ? 2 : 0;
  const auto number = [&](int i) {
    if (in.with[i] >= 0) return uint32_t(in.with[i]);
    return members_of(w, in.at[at++], mask);
  };
  const uint32_t which = number(0), wanted = number(1);
  if (which >= BARRIERS) return report(w, -1, "bar: barrier " + std::to_string(which) + " of 16");
  if (mask != w.live) report(w, -1, "bar: not all lanes of the warp are here (barrier divergence)");
  if (!reduces) return arrive(w, int(which), wanted, waits);
  arrive(w, int(which), wanted, true, {in.at[0], Reduction::What(in.with[2]), mask, *w.at<Mask>(in.at[1]) & mask});
}

// 9.7.13.13: the launch before has ended, and what it wrote is there, for who waits and whom it
// synchronises with
void wait_for_launch(Warp& w, const Instruction&, Mask mask) {
  if (mask == w.live) w.past.ended = true;
  for (int i = 0; i < LANES && mask != w.live; i++) {
    if (mask >> i & 1) of_lane(w, i).ended = true;
  }
}
void launch_dependents(Warp& w, const Instruction&, Mask mask) {
  for (int i = 0; i < LANES; i++) {
    const bool waited = w.past.ended || (w.apart >> i & 1 && w.of_lanes[size_t(i)].ended);
    if (mask >> i & 1 && !waited) w.block->launch->passes_on = true;
  }
}

// what CUDA's assert and Triton's device_assert call: the message, the file and the line
void assert_fail(Warp& w, const Instruction& in, Mask mask) {
  const int lane = __builtin_ctz(mask);
  std::string said[2];
  for (int k = 0; k < 2; k++) {
    uint64_t at = w.at<uint64_t>(in.at[k])[lane];
    for (const Buffer& b : w.block->launch->buffers) {
      for (; at >= b.first && at < b.last && *reinterpret_cast<const char*>(at); at++)
        said[k] += *reinterpret_cast<const char*>(at);
    }
  }
  report(w, lane,
         "assertion failed: " + said[0] + ", " + said[1] + ":" + std::to_string(w.at<uint32_t>(in.at[2])[lane]));
}

// clang-format off: a line an instruction
#define RUN [](Warp& w, const Instruction& in, Mask mask)
#define VOTE(name, value) {"vote.sync." name ".pred", "p=p,32", RUN { vote(w, in, mask, [](Mask yes, Mask here) { (void)here; return value; }); }, Flow::together}
#define REDUX(name, T, value) {"redux.sync." name, "32=32,32", RUN { redux<T>(w, in, mask, [](T x, T y) { return T(value); }); }, Flow::together}

const Table entries{
    {"bra", "=i", nullptr, Flow::branch},
    {"exit", "=", nullptr, Flow::exit},
    {"shfl.sync.up.b32", "32,p=32,32,32,32", shuffle<UP>, Flow::together},
    {"shfl.sync.down.b32", "32,p=32,32,32,32", shuffle<DOWN>, Flow::together},
    {"shfl.sync.bfly.b32", "32,p=32,32,32,32", shuffle<BUTTERFLY>, Flow::together},
    {"shfl.sync.idx.b32", "32,p=32,32,32,32", shuffle<INDEX>, Flow::together},
    VOTE("all", yes == here), VOTE("any", yes != 0), VOTE("uni", yes == here || yes == 0),
    {"vote.sync.ballot.b32", "32=p,32", ballot, Flow::together},
    {"activemask.b32", "32=", active_mask, Flow::none},
    {"elect.sync", "32,p=32", elect, Flow::together},
    REDUX("add.u32", uint32_t, x + y), REDUX("add.s32", uint32_t, x + y), REDUX("min.u32", uint32_t, x < y ? x : y),
    REDUX("min.s32", int32_t, x < y ? x : y), REDUX("max.u32", uint32_t, x > y ? x : y), REDUX("max.s32", int32_t, x > y ? x : y),
    REDUX("and.b32", uint32_t, x & y), REDUX("or.b32", uint32_t, x | y), REDUX("xor.b32", uint32_t, x ^ y),
    {"bar.warp.sync", "=32", warp_sync, Flow::together},
    {"bar.sync", "*", RUN { barrier(w, in, mask, true); }, Flow::barrier},
    {"bar.red", "*", RUN { barrier(w, in, mask, true, true); }, Flow::barrier},
    {"match.any.sync.b32", "32=32,32", match_any<uint32_t>, Flow::together},
    {"match.any.sync.b64", "32=64,32", match_any<uint64_t>, Flow::together},
    {"match.all.sync.b32", "32,p=32,32", match_all<uint32_t>, Flow::together},
    {"match.all.sync.b64", "32,p=64,32", match_all<uint64_t>, Flow::together},
    {"bar.arrive", "*", RUN { barrier(w, in, mask, false); }, Flow::together},
    {"griddepcontrol.wait", "=", wait_for_launch, Flow::none},
    {"griddepcontrol.launch_dependents", "=", launch_dependents, Flow::none},
    {"nanosleep", "=32", nothing, Flow::pause},
    // 9.7.21: an exit follows
    {"trap", "=", [](Warp& w, const Instruction&, Mask mask) { report(w, __builtin_ctz(mask), "trap"); }, Flow::none},
    {"assertfail", "=64,64,32", assert_fail, Flow::none},
    // a clock that counts the launch's instructions
    {"clock.b32", "32=", RUN { each(w.at<uint32_t>(in.at[0]), mask, [&](int) { return uint32_t(w.block->launch->counters.instructions); }); }, Flow::none},
    {"clock.b64", "64=", RUN { each(w.at<uint64_t>(in.at[0]), mask, [&](int) { return w.block->launch->counters.instructions; }); }, Flow::none},
};
// clang-format on

}  // namespace

}  // namespace lk::ptx
