// What the lanes of a warp, and the warps of a block, do together.
// PTX ISA 9.7.9 shfl, 9.7.13 bar, barrier, vote, match, redux, activemask, elect, griddepcontrol.
#include "block.h"
#include "numbers.h"

namespace lk::ptx {

namespace {

// The lanes named in a member mask must be here; a lane that is not would be waited for, forever if it never comes.
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

// shfl.sync: the result, whether the source lane is in range, value, lane or distance, clamp and segment, member mask
enum Mode { UP, DOWN, BUTTERFLY, INDEX };
template <Mode MODE>
void shuffle(Warp& w, const Instruction& in, Mask mask) {
  const uint32_t *x = w.at<uint32_t>(in.at[2]), *by = w.at<uint32_t>(in.at[3]), *c = w.at<uint32_t>(in.at[4]);
  need(w, mask, members_of(w, in.at[5], mask), "shfl");
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
  need(w, mask, members_of(w, in.at[0], mask), "bar.warp.sync");
  tick(w);
}

// bar: the immediates are the barrier and the threads it waits for, 0 for all; -1 if a register says so
void barrier(Warp& w, const Instruction& in, Mask mask, bool waits) {
  int at = 0;
  const auto number = [&](int i) {
    if (in.with[i] >= 0) return uint32_t(in.with[i]);
    return members_of(w, in.at[at++], mask);
  };
  const uint32_t which = number(0), wanted = number(1);
  if (which >= BARRIERS) return report(w, -1, "bar: barrier " + std::to_string(which) + " of 16");
  if (mask != w.live) report(w, -1, "bar: not all lanes of the warp are here (barrier divergence)");
  arrive(w, int(which), wanted, waits);
}

void nothing(Warp&, const Instruction&, Mask) {}

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
    {"bar.arrive", "*", RUN { barrier(w, in, mask, false); }, Flow::together},
    {"griddepcontrol", "=", nothing, Flow::none},  // launches do not overlap here
    {"nanosleep", "=32", nothing, Flow::pause},
};
// clang-format on

}  // namespace

}  // namespace lk::ptx
