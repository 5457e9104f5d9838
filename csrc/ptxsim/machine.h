// A functional simulator of PTX: what one instruction sees. A warp runs its lanes in lockstep where
// they are at the same instruction; lanes that diverge run apart, the lowest instruction first, and
// join where they meet. PTX ISA: https://docs.nvidia.com/cuda/parallel-thread-execution (sections
// are cited at each instruction).
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace lk::ptx {

constexpr int LANES = 32, WARPS = 32;  // of a warp, of a block
// whoever copies in bulk, as if they were more warps: one for each mbarrier (those of a block share
// them if there are more)
constexpr int ENGINE = WARPS, ENGINES = 16;
using Mask = uint32_t;  // a bit a lane
constexpr Mask ALL = ~Mask{0};

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, Mask);

// what the counters and the scheduler distinguish
// together: lanes wait for one another
enum class Flow : uint8_t { none, together, branch, exit, barrier, pause };

struct Instruction {
  Handler run;
  Flow flow;
  const int32_t* at;    // operands: byte offsets into the warp's registers
  const int64_t* with;  // immediates: offsets, counts, targets
  int32_t predicate;    // offset of the guard, or -1
  bool negated;
  int32_t results;  // how many operands it writes, which come first
  int32_t line;     // of the PTX text
  int32_t opcode;   // index into the program's list of names, for the counters
};

struct Program {
  std::vector<Instruction> code;
  std::vector<int32_t> operands;
  std::vector<int64_t> immediates;
  std::vector<uint8_t> registers;  // of a warp at its start: constants and zeros
  std::vector<std::string> names;
  int32_t wgmma = -1;  // in it: that of wgmma.mma_async
  // where the special registers lie, or -1
  int32_t tid[3], ctaid[3], nctaid[3], ntid[3], laneid, warpid;
  uint32_t shared_bytes = 0;  // static
  uint32_t local_bytes = 0;   // a thread
};

// A tensor that the launch may touch.
struct Buffer {
  std::string name;
  uint64_t first, last;  // addresses, one past the end
  bool writable;
  bool poisoned;  // reading what was never written is an error
};

struct Counters {
  // global; sectors of 32 bytes
  uint64_t load_sectors = 0, store_sectors = 0, load_bytes = 0, store_bytes = 0;
  uint64_t load_requests = 0, store_requests = 0;
  // of loads, stores, ldmatrix, stmatrix and cp.async
  uint64_t shared_wavefronts = 0, shared_ideal = 0;
  uint64_t mma = 0, barriers = 0, atomics = 0, instructions = 0, blocks = 0;
};

struct Block;

// lanes of a warp that are at the same instruction
struct Group {
  Mask lanes;
  int32_t pc;
};

// a cp.async that has not been waited for
struct Copy {
  // shared address, size, how much of it comes from memory (the rest is zero)
  uint32_t to, bytes, taken;
  uint64_t from;
  int lane;
};

// an access: of which lane of which warp, at which of its clocks
struct Stamp {
  uint32_t clock = 0;  // 0: none
  uint16_t warp = 0;
  uint16_t lane = 0;
};

// up to which clock the accesses of each warp, and copies in bulk, come before something
struct Reach {
  std::array<uint32_t, WARPS + ENGINES> clock{}, later{};  // of all lanes; of those in `lanes`
  std::array<Mask, WARPS + ENGINES> lanes{};
  bool parts = false;  // `later` and `lanes` are in use

  bool covers(const Stamp& s) const {
    if (clock[s.warp] >= s.clock) return true;
    return parts && s.lane < LANES && later[s.warp] >= s.clock && lanes[s.warp] >> s.lane & 1;
  }
  void add_lanes(size_t warp, uint32_t to, Mask of) {
    if (to <= clock[warp]) return;
    parts = true;
    const bool fresh = later[warp] <= clock[warp];
    later[warp] = fresh ? to : std::max(later[warp], to);
    lanes[warp] = fresh ? of : lanes[warp] | of;
    if (lanes[warp] == ALL) clock[warp] = later[warp];
  }
  void join(const Reach& other) {
    for (size_t i = 0; i < clock.size(); i++) clock[i] = std::max(clock[i], other.clock[i]);
    for (size_t i = 0; other.parts && i < clock.size(); i++) add_lanes(i, other.later[i], other.lanes[i]);
  }
};
struct Past {
  Reach known, proxied;  // all; those that a fence.proxy.async follows
  bool ended = false;    // the launch before, by griddepcontrol.wait
  void join(const Past& other) {
    known.join(other.known);
    proxied.join(other.proxied);
    ended |= other.ended;
  }
};

// wgmma that have not been waited for, the registers that they will write, and those that they read
struct Products {
  std::vector<std::function<void()>> run;
  std::vector<int32_t> sums, sources;
};
enum Held : uint8_t { FREE = 0, SUM = 1, SOURCE = 2 };

struct Warp {
  Block* block;
  int index;
  Mask live;
  std::vector<Group> groups;
  std::unique_ptr<uint8_t[]> registers;
  uint32_t clock = 1;   // counts what this warp tells others
  uint32_t synced = 1;  // its clock when its lanes last synchronised
  Past past;            // what comes before this warp's accesses
  Mask apart = 0;       // lanes that learnt more since then, each by itself:
  std::vector<Past> of_lanes;
  std::vector<Copy> open;  // since the last commit
  std::vector<std::vector<Copy>> committed;
  Products products;  // since the last commit
  std::vector<Products> committed_products;
  // Held of each register by its offset in units of 4 bytes; none while nothing multiplies
  std::vector<uint8_t> held;
  uint64_t seen = 0;              // Block::events when it last waited at an mbarrier in vain
  uint64_t done = 0, waited = 0;  // instructions; when it last waited at an mbarrier
  Mask vain = 0;                  // lanes whose last wait there was in vain: others go first
  // waits at an mbarrier, one after another, between which nothing happened
  int idle = 0;
  int waiting = -1;  // at this barrier
  Mask arrived = 0;  // lanes that wait there
  const Instruction* now = nullptr;

  template <typename T>
  T* at(int32_t offset) const {
    return reinterpret_cast<T*>(registers.get() + offset);
  }
};

// out[i] = f(i) for the lanes of `mask`; without a branch where all take part
template <typename T, typename F>
inline void each(T* out, Mask mask, F&& f) {
  if (mask == ALL) {
    for (int i = 0; i < LANES; i++) out[i] = f(i);
  } else {
    for (int i = 0; i < LANES; i++) {
      if (mask >> i & 1) out[i] = f(i);
    }
  }
}

// of instructions that only hardware needs
inline void nothing(Warp&, const Instruction&, Mask) {}

// an error of the kernel, which is noted and does not stop the run
void report(const Warp& warp, int lane, const std::string& what);

// how a table of instructions enters the list that the decoder reads
struct Entry {
  const char* name;
  // widths in bits, results before '=': "32=32,32"; p a predicate, a an address, i an immediate
  const char* operands;
  Handler run;
  Flow flow;
};
struct Table {
  explicit Table(std::initializer_list<Entry> entries);
};
const std::vector<Entry>& table();
// how many operands an instruction writes
int32_t results_of(const Entry& entry, const int64_t* immediates);

}  // namespace lk::ptx
