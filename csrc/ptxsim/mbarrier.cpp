// Barriers in shared memory that count arrivals and bytes of copies. PTX ISA 9.7.14.16: mbarrier.
// The first operand that is no result is the address; the immediates are its offset and the bytes
// of its register.
#include "block.h"

namespace lk::ptx {

namespace {

constexpr uint32_t BYTES = 8, MOST = (1u << 20) - 1;  // of the object; arrivals that it can count

uint32_t place(const Warp& w, const Instruction& in, int operand, int lane) {
  return uint32_t(address_of(w, lane, in.at[operand], in.with[0], in.with[1]));
}

void complete(MBarrier& m) {
  if (m.pending || m.bytes) return;
  m.phase++;
  m.pending = m.expected;
  m.passed.join(m.arrived);
}

template <typename F>
void each_lane(Warp& w, Mask mask, F&& f) {
  for (int i = 0; i < LANES; i++) {
    if (mask >> i & 1) f(i);
  }
  w.block->events++;
}

// address, arrivals
void init(Warp& w, const Instruction& in, Mask mask) {
  each_lane(w, mask, [&](int i) {
    const uint32_t at = place(w, in, 0, i), count = w.at<uint32_t>(in.at[1])[i];
    if (!shared_at(w, i, at, BYTES, Access::store, "mbarrier.init")) return;
    if (count < 1 || count > MOST) return report(w, i, "mbarrier.init: " + std::to_string(count) + " arrivals");
    const MBarrier fresh{count, count, 0, 0, ENGINE + w.block->engines++ % ENGINES, {}, {}};
    if (!w.block->mbarriers.try_emplace(at, fresh).second)
      report(w, i, "mbarrier.init: there is one at " + std::to_string(at));
  });
}

void invalidate(Warp& w, const Instruction& in, Mask mask) {
  each_lane(w, mask, [&](int i) {
    const uint32_t at = place(w, in, 0, i);
    if (!mbarrier_at(w, i, at, "mbarrier.inval")) return;
    shared_at(w, i, at, BYTES, Access::store, "mbarrier.inval");
    w.block->mbarriers.erase(at);
  });
}

// the state, the address, arrivals, bytes to expect
void arrive(Warp& w, const Instruction& in, Mask mask) {
  each_lane(w, mask, [&](int i) {
    MBarrier* m = mbarrier_at(w, i, place(w, in, 1, i), "mbarrier.arrive");
    if (!m) return;
    w.at<uint64_t>(in.at[0])[i] = m->phase;
    m->bytes += w.at<uint32_t>(in.at[3])[i];
    arrive_at(w, i, *m, w.at<uint32_t>(in.at[2])[i], "mbarrier.arrive");
  });
  w.clock++;
}

// the address, bytes
void expect(Warp& w, const Instruction& in, Mask mask, int64_t sign) {
  each_lane(w, mask, [&](int i) {
    MBarrier* m = mbarrier_at(w, i, place(w, in, 0, i), "mbarrier.expect_tx");
    if (!m) return;
    m->bytes += sign * w.at<uint32_t>(in.at[1])[i];
    complete(*m);
  });
}

// whether it is done, the address, the state or the parity of the phase; copies that it waits for
// land here
template <typename T>
void wait(Warp& w, const Instruction& in, Mask mask) {
  Mask done = 0;
  std::array<const MBarrier*, LANES> passed{};
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    const uint32_t at = place(w, in, 1, i);
    MBarrier* m = mbarrier_at(w, i, at, "mbarrier.wait");
    if (!m) {
      done |= Mask{1} << i;  // else it would wait for ever
      continue;
    }
    const auto phase = uint32_t(w.at<T>(in.at[2])[i]) & 1;
    if ((m->phase & 1) == phase) land_for(w, at);
    if ((m->phase & 1) == phase) continue;
    done |= Mask{1} << i;
    passed[size_t(i)] = m;
  }
  Mask& p = *w.at<Mask>(in.at[0]);
  p = (p & ~mask) | done;
  const bool together = done == w.live;
  const MBarrier* last = nullptr;
  for (int i = 0; i < LANES && done; i++) {
    const MBarrier* m = passed[size_t(i)];
    if (!m || (together && m == last)) continue;
    (together ? w.past : of_lane(w, i)).join(m->passed);
    last = m;
  }
  if (together) tick(w);
  w.vain |= mask & ~done;
  w.idle = done || works(w) || w.block->events != w.seen ? 0 : w.idle + 1;
  w.waited = w.done;
  w.seen = w.block->events;
}

const Table entries{
    {"mbarrier.init", "*", init, Flow::none},
    {"mbarrier.inval", "*", invalidate, Flow::none},
    {"mbarrier.arrive", "*", arrive, Flow::none},
    {"mbarrier.expect_tx", "*", [](Warp& w, const Instruction& in, Mask m) { expect(w, in, m, 1); }, Flow::none},
    {"mbarrier.complete_tx", "*", [](Warp& w, const Instruction& in, Mask m) { expect(w, in, m, -1); }, Flow::none},
    {"mbarrier.wait", "*", wait<uint64_t>, Flow::pause},
    {"mbarrier.wait.parity", "*", wait<uint32_t>, Flow::pause},
};

}  // namespace

void gather(Warp& w) {
  for (size_t i = 0; i < LANES && w.apart; i++) {
    if (w.apart >> i & 1) w.past.join(w.of_lanes[i]);
  }
  w.apart = 0;
}

void tick(Warp& w) {
  w.synced = ++w.clock;
  gather(w);
}

Past& of_lane(Warp& w, int lane) {
  if (w.of_lanes.empty()) w.of_lanes.resize(LANES);
  Past& known = w.of_lanes[size_t(lane)];
  if (!(w.apart >> lane & 1)) known = {};
  w.apart |= Mask{1} << lane;
  return known;
}

void join_known(Past& to, const Warp& w, int lane) {
  to.join(w.past);
  if (w.apart >> lane & 1) to.join(w.of_lanes[size_t(lane)]);
}

MBarrier* mbarrier_at(Warp& w, int lane, uint32_t address, const char* what) {
  if (!shared_at(w, lane, address, BYTES, Access::atomic, what)) return nullptr;
  const auto found = w.block->mbarriers.find(address);
  if (found != w.block->mbarriers.end()) return &found->second;
  report(w, lane, std::string(what) + ": there is no mbarrier at " + std::to_string(address));
  return nullptr;
}

void arrive_at(Warp& w, int lane, MBarrier& m, uint32_t count, const char* what) {
  if (count > m.pending) {
    return report(w, lane,
                  std::string(what) + ": " + std::to_string(count) + " arrivals where " + std::to_string(m.pending) +
                      " of " + std::to_string(m.expected) + " are awaited");
  }
  join_known(m.arrived, w, lane);
  Reach& known = m.arrived.known;
  known.clock[size_t(w.index)] = std::max(known.clock[size_t(w.index)], w.synced - 1);
  // with all that live all have arrived
  known.add_lanes(size_t(w.index), w.clock, Mask{1} << lane | ~w.live);
  m.pending -= count;
  complete(m);
}

void land_for(Warp& w, uint32_t mbarrier) {
  Block& block = *w.block;
  auto copies = std::move(block.arriving);
  block.arriving.clear();
  for (Bulk& copy : copies) {
    if (copy.mbarrier != mbarrier) {
      block.arriving.push_back(std::move(copy));
      continue;
    }
    MBarrier& m = block.mbarriers.at(mbarrier);
    land_bulk(block, copy, m.engine);
    m.arrived.known.clock[size_t(m.engine)] = m.arrived.proxied.clock[size_t(m.engine)] = block.engine;
    m.bytes -= copy.bytes;
    m.pending -= std::min(m.pending, copy.arrivals);
    block.events++;
    complete(m);
  }
}

}  // namespace lk::ptx
