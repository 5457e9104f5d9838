// Who runs when: the warps of a block in turn, a few blocks side by side, both in an order drawn
// from the seed.
#include <algorithm>
#include <climits>

#include "block.h"

namespace lk::ptx {

namespace {

constexpr uint64_t TURN = 4000;  // instructions of a warp before the next one has its turn

std::vector<Entry>& all_entries() {
  static std::vector<Entry> entries;
  return entries;
}

void set_special(Warp& w, int32_t at, uint32_t value) {
  if (at >= 0) std::fill_n(w.at<uint32_t>(at), LANES, value);
}

std::unique_ptr<Block> start(Launch& launch, uint32_t index) {
  const Program& program = *launch.program;
  auto block = std::make_unique<Block>();
  block->launch = &launch;
  block->index = index;
  block->id[0] = index % launch.grid[0];
  block->id[1] = index / launch.grid[0] % launch.grid[1];
  block->id[2] = index / launch.grid[0] / launch.grid[1];
  block->shared.assign(launch.shared_bytes, 0xff);  // NaN, should anyone read it
  if (launch.options.check) block->chunks.resize(launch.shared_bytes / Chunk::BYTES + 1);
  const uint32_t* size = launch.block;
  const uint32_t threads = size[0] * size[1] * size[2];
  block->local.resize(uint64_t(threads + LANES) * program.local_bytes);
  for (uint32_t first = 0; first < threads; first += LANES) {
    auto w = std::make_unique<Warp>();
    w->block = block.get();
    w->index = int(first / LANES);
    w->live = threads - first >= LANES ? ALL : (Mask{1} << (threads - first)) - 1;
    w->groups = {{w->live, 0}};
    w->registers.reset(new uint8_t[program.registers.size()]);
    std::memcpy(w->registers.get(), program.registers.data(), program.registers.size());
    for (int d = 0; d < 3; d++) {
      set_special(*w, program.ctaid[d], block->id[d]);
      set_special(*w, program.nctaid[d], launch.grid[d]);
      set_special(*w, program.ntid[d], size[d]);
    }
    set_special(*w, program.warpid, uint32_t(w->index));
    for (int i = 0; i < LANES; i++) {
      const uint32_t t = first + uint32_t(i);
      const uint32_t tid[3] = {t % size[0], t / size[0] % size[1], t / size[0] / size[1]};
      for (int d = 0; d < 3; d++) {
        if (program.tid[d] >= 0) w->at<uint32_t>(program.tid[d])[i] = tid[d];
      }
      if (program.laneid >= 0) w->at<uint32_t>(program.laneid)[i] = uint32_t(i);
    }
    block->warps.push_back(std::move(w));
  }
  launch.counters.blocks++;
  return block;
}

// bar.red's result for each warp that waits
void reduce(Block& block, const Barrier& barrier) {
  uint32_t count = 0, yes = 0;
  for (const Arrival& from : barrier.arrived) {
    count += uint32_t(__builtin_popcount(from.reduction.lanes));
    yes += uint32_t(__builtin_popcount(from.reduction.yes));
  }
  for (const Arrival& to : barrier.arrived) {
    const Reduction& r = to.reduction;
    if (r.to < 0) continue;
    Warp& w = *block.warps[to.warp];
    if (r.what == Reduction::POPC) {
      each(w.at<uint32_t>(r.to), r.lanes, [&](int) { return yes; });
    } else {
      Mask& p = *w.at<Mask>(r.to);
      p = (p & ~r.lanes) | ((r.what == Reduction::AND ? yes == count : yes > 0) ? r.lanes : 0);
    }
  }
}

// lets those go on who wait at a barrier that is complete
void settle(Block& block, Barrier& barrier) {
  if (barrier.arrived.empty()) return;
  size_t running = 0;
  for (const auto& w : block.warps) running += w->live != 0;
  const bool all = barrier.wanted == 0;
  if (barrier.arrived.size() < (all ? running : barrier.wanted / LANES)) return;
  Past before;
  for (const Arrival& from : barrier.arrived) {
    before.join(from.past);
    uint32_t& known = before.known.clock[size_t(from.warp)];
    known = std::max(known, from.clock);
  }
  for (const Arrival& to : barrier.arrived) {
    if (!to.waits) continue;
    Warp& w = *block.warps[size_t(to.warp)];
    w.past.join(before);
    w.waiting = -1;
  }
  reduce(block, barrier);
  const uint32_t* size = block.launch->block;
  block.passed += all || barrier.wanted == size[0] * size[1] * size[2];
  barrier = {};
  block.events++;
}

void finish(Warp& w, Mask lanes) {
  check_left(w, lanes);
  w.live &= ~lanes;
  if (w.live) return;
  for (Barrier& barrier : w.block->barriers) {
    if (barrier.wanted == 0) settle(*w.block, barrier);
  }
}

// lanes that are at one instruction run as one group
void merge(Warp& w) {
  std::sort(w.groups.begin(), w.groups.end(), [](const Group& a, const Group& b) { return a.pc < b.pc; });
  size_t last = 0;
  for (size_t i = 1; i < w.groups.size(); i++) {
    if (w.groups[i].pc == w.groups[last].pc) w.groups[last].lanes |= w.groups[i].lanes;
    else w.groups[++last] = w.groups[i];
  }
  w.groups.resize(last + 1);
}

bool waits_for_others(const Warp& w, const Group& group, const Instruction* code) {
  const Flow flow = code[group.pc].flow;
  return (flow == Flow::together || flow == Flow::barrier) && group.lanes != w.live;
}

// The lanes at the lowest instruction, but those that wait there for others come last: these may
// arrive, or exit.
size_t choose(Warp& w, const Instruction* code) {
  if (w.groups.size() == 1) return 0;
  for (size_t i = 0; w.vain && i < w.groups.size(); i++) {
    if (!(w.groups[i].lanes & w.vain) && !waits_for_others(w, w.groups[i], code)) return i;
  }
  w.vain = 0;
  for (size_t i = 0; i < w.groups.size(); i++) {
    if (!waits_for_others(w, w.groups[i], code)) return i;
  }
  return 0;
}

// until it is waited for, a register that wgmma will write is left alone, and one that it reads is
// not written
void check_held(Warp& w, const Instruction& in) {
  const Program& program = *w.block->launch->program;
  if (&in == &program.code.back()) return;
  const bool multiplies = in.opcode == program.wgmma;  // adds to its own, in their order
  for (const int32_t* at = in.at; at != (&in)[1].at; at++) {
    const bool result = at - in.at < in.results;
    const auto held = w.held[size_t(*at) / 4];
    if (held & SUM && !(result && multiplies))
      return report(w, -1, "an accumulator of wgmma.mma_async is used before wgmma.wait_group");
    if (held & SOURCE && result)
      return report(w, -1, "a register of A of wgmma.mma_async is written before wgmma.wait_group");
  }
}

// runs a warp until it waits, ends, or has had its turn
void advance(Warp& w) {
  Launch& launch = *w.block->launch;
  const Instruction* code = launch.program->code.data();
  uint64_t left = TURN;
  const Mask vain = w.vain;
  while (w.live && w.waiting < 0 && left > 0) {
    merge(w);
    const size_t chosen = choose(w, code);
    Group group = w.groups[chosen];
    const bool alone = w.groups.size() == 1;
    const auto meets = [&] {
      for (size_t i = 0; i < w.groups.size(); i++) {
        if (i != chosen && w.groups[i].pc == group.pc) return true;
      }
      return false;
    };
    bool go = true, first = true;
    while (go && left > 0) {
      if (!alone && !first && (meets() || waits_for_others(w, group, code))) break;
      first = false;
      const Instruction& in = code[group.pc];
      Mask mask = group.lanes;
      if (in.predicate >= 0) {
        const Mask p = *w.at<Mask>(in.predicate);
        mask &= in.negated ? ~p : p;
      }
      w.now = &in;
      if (mask && !w.held.empty()) check_held(w, in);
      left--;
      launch.by_opcode[in.opcode]++;
      launch.counters.instructions++;
      w.block->done++;
      w.done++;
      group.pc++;
      switch (in.flow) {
        case Flow::none:
        case Flow::together:
          if (mask) in.run(w, in, mask);
          break;
        case Flow::branch: {
          const int target = int(in.with[0]);
          const Mask stay = group.lanes & ~mask;
          if (mask && stay) {
            w.groups.push_back({mask, target});
            group.lanes = stay;
            go = false;
          } else if (mask) {
            group.pc = target;
          }
          break;
        }
        case Flow::exit:
          group.lanes &= ~mask;
          w.groups[chosen] = group;
          finish(w, mask);
          go = false;
          break;
        case Flow::barrier:
          if (mask) {
            launch.counters.barriers++;
            in.run(w, in, mask);
          }
          go = w.waiting < 0;
          break;
        case Flow::pause:
          if (mask) in.run(w, in, mask);
          left = 0;
          break;
      }
    }
    if (group.lanes) w.groups[chosen] = group;
    else w.groups.erase(w.groups.begin() + int64_t(chosen));
  }
  if (w.vain == vain) w.vain = 0;
}

bool ended(const Block& block) {
  return std::all_of(block.warps.begin(), block.warps.end(), [](const auto& w) { return w->live == 0; });
}

// turns in which all that runs waits at mbarriers and nothing happens: it never will
constexpr int IDLE = 1000;

// a turn for each warp; false if none can go on
bool turn(Block& block) {
  Launch& launch = *block.launch;
  std::vector<Warp*> order;
  for (const auto& w : block.warps) {
    if (w->live && w->waiting < 0) order.push_back(w.get());
  }
  if (std::all_of(order.begin(), order.end(), [](Warp* w) { return w->idle > IDLE && !works(*w); })) return false;
  if (launch.options.shuffle) std::shuffle(order.begin(), order.end(), launch.random);
  for (Warp* w : order) advance(*w);
  return true;
}

}  // namespace

Table::Table(std::initializer_list<Entry> entries) { all_entries().insert(all_entries().end(), entries); }
const std::vector<Entry>& table() { return all_entries(); }

int32_t results_of(const Entry& entry, const int64_t* immediates) {
  const std::string name = entry.name, form = entry.operands;
  const auto begins = [&](const char* with) { return name.rfind(with, 0) == 0; };
  if (form != "*") {
    const std::string written = form.substr(0, form.find('='));
    return written.empty() ? 0 : int32_t(std::count(written.begin(), written.end(), ',')) + 1;
  }
  if (name == "ld") return int32_t(immediates[7]);
  if (name == "ldmatrix") return int32_t(immediates[2]);
  if (name == "wgmma.mma_async") return int32_t(immediates[0] / 2);
  return begins("atom.") || begins("mbarrier.wait") || name == "mbarrier.arrive" || name == "bar.red";
}

void arrive(Warp& w, int which, uint32_t wanted, bool waits, const Reduction& reduction) {
  Block& block = *w.block;
  Barrier& barrier = block.barriers[which];
  if (!barrier.arrived.empty() && barrier.wanted != wanted) {
    report(w, -1,
           "bar: barrier " + std::to_string(which) + " waits for " + std::to_string(barrier.wanted) + " threads, not " +
               std::to_string(wanted));
  }
  if (!barrier.arrived.empty() && (barrier.arrived[0].reduction.to < 0) != (reduction.to < 0))
    report(w, -1, "bar: some warps reduce at barrier " + std::to_string(which) + ", some do not");
  barrier.wanted = wanted;
  gather(w);
  barrier.arrived.push_back({w.index, w.clock, w.past, waits, reduction});
  tick(w);
  if (waits) w.waiting = which;
  settle(block, barrier);
}

void Launch::run() {
  random.seed(options.seed);
  by_opcode.assign(program->names.size(), 0);
  std::vector<uint32_t> order(uint64_t(grid[0]) * grid[1] * grid[2]);
  for (size_t i = 0; i < order.size(); i++) order[i] = uint32_t(i);
  if (options.shuffle) std::shuffle(order.begin(), order.end(), random);
  std::vector<std::unique_ptr<Block>> resident;
  size_t next = 0;
  while (next < order.size() || !resident.empty()) {
    while (next < order.size() && int(resident.size()) < options.resident)
      resident.push_back(start(*this, order[next++]));
    for (auto& block : resident) {
      const bool goes_on = turn(*block);
      const bool given_up = options.steps && block->done > options.steps;
      if (ended(*block)) {
        if (!block->arriving.empty())
          report(*block->warps[0], -1, "exit: a cp.async.bulk into shared memory has not been waited for");
        block.reset();
      } else if (!goes_on || given_up) {
        const auto stuck = std::find_if(block->warps.begin(), block->warps.end(),
                                        [](const auto& w) { return w->live != 0; });
        report(**stuck, -1,
               goes_on                 ? "given up: the block runs on and on"
               : (*stuck)->waiting < 0 ? "deadlock: waits at an mbarrier"
                                       : "deadlock: waits at barrier " + std::to_string((*stuck)->waiting));
        block.reset();
      }
    }
    resident.erase(std::remove(resident.begin(), resident.end(), nullptr), resident.end());
  }
}

}  // namespace lk::ptx
