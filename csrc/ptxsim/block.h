// A launch, its blocks and their memory, with what is known of each byte: who wrote and read it
// last, and when.
#pragma once
#include <array>
#include <map>
#include <random>

#include "machine.h"

namespace lk::ptx {

constexpr int BARRIERS = 16;
// a generic address of shared or local memory is its offset in one of these windows
constexpr uint64_t SHARED_WINDOW = 0x7f00000000000000, LOCAL_WINDOW = 0x7e00000000000000;
// a kernel's parameters, whose address it may take
constexpr uint64_t PARAMETER_WINDOW = 0x7d00000000000000;

// an asynchronous copy will write some bytes, or it has; one will read them, or it has; the same of
// a wgmma
enum class Travel : uint8_t { arriving, leaves, left, multiplies, multiplied };

// what is known of some bytes of shared memory
struct Cell {
  Stamp write, read;
  int32_t readers =
      // where there are several warps since the last write: their last reads or atomics, in
      // Block::readers
      -1;
  bool ready = false;   // written
  bool atomic = false;  // `read` and `readers` are atomics
  bool arriving = false;
  uint16_t leaving = 0, multiplied = 0;  // copies; wgmma that read it
};

// 16 bytes, which are accessed as one nearly always; else each byte has a cell of its own, in
// Block::pieces
struct Chunk {
  static constexpr uint32_t BYTES = 16, PIECE = 1, PIECES = BYTES / PIECE;
  Cell whole;
  int32_t pieces = -1;
};

// an access of one element of a writable tensor
struct Mark {
  uint32_t block = 0;    // its number and 1; 0: none
  uint32_t clock = 0;    // of its warp; of the block's barriers if many
  uint32_t release = 0;  // of its block
  uint16_t warp = 0;
  uint8_t lane = 0;
  bool many = false;  // several warps or lanes
  bool atomic = false;
};
struct Element {
  Mark write, read;
  bool written() const { return write.block != 0 || read.atomic; }
};

struct Shadow {
  Element* elements = nullptr;  // sparse: pages that are never touched take no memory
  uint64_t bytes = 0;
};

// of each block: up to which clock its accesses come before
using Clocks = std::map<uint32_t, uint32_t>;
inline void join(Clocks& into, const Clocks& from) {
  for (const auto& [block, clock] : from) into[block] = std::max(into[block], clock);
}

// PTX ISA 9.7.13.1: what bar.red gives each thread of the predicates of all, and where
struct Reduction {
  enum What : int64_t { POPC, AND, OR };
  int32_t to = -1;
  What what = POPC;
  Mask lanes = 0, yes = 0;
};
struct Arrival {
  int warp;
  uint32_t clock;
  Past past;
  bool waits;
  Reduction reduction;
};
struct Barrier {
  std::vector<Arrival> arrived;
  uint32_t wanted = 0;  // threads; 0: all of the block
};

// PTX ISA 9.7.14.16: arrivals and bytes that a phase waits for
struct MBarrier {
  uint32_t expected, pending;
  int64_t bytes = 0;  // still to come
  uint32_t phase = 0;
  int engine = ENGINE;   // that copies for it
  Past arrived, passed;  // what comes before those who arrived; when the last phase was complete
};

// up to 16 bytes of shared memory, of which some come from or go to a tensor; the rest, past its
// end, is zero
struct Piece {
  uint32_t shared, size = 16, skip = 0, bytes = 0;
  uint64_t global = 0;
};
// a copy in bulk that is under way: into shared memory until its mbarrier is waited for, out of it
// until its group is
struct Bulk {
  std::vector<Piece> pieces;
  uint32_t mbarrier = 0;
  int64_t bytes = 0;      // that the mbarrier is told of
  uint32_t arrivals = 0;  // that it is told of
};
struct Groups {
  std::vector<Bulk> open;
  std::vector<std::vector<Bulk>> committed;
};

struct Options {
  bool check = true;  // races, initialisation
  bool late = true;   // cp.async lands when it is waited for, else at once
  bool shuffle = true;
  uint64_t seed = 0;
  uint64_t steps = 0;  // a block's instructions after which the launch is given up; 0: none
  bool trace = false;
  int resident = 8;  // blocks that run side by side
};

// what the launch before reads or writes, and may still be at
struct Before {
  std::string name;
  uint64_t first, last;
  bool written;
};

struct Launch;

struct Block {
  Launch* launch;
  uint32_t index, id[3];
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<uint8_t> shared, local;
  std::vector<Chunk> chunks;
  std::vector<std::array<Cell, Chunk::PIECES>> pieces;
  std::vector<std::array<Stamp, WARPS>> readers;
  std::vector<int32_t> spare;  // of these, to be used again
  std::array<Barrier, BARRIERS> barriers;
  uint32_t passed = 0;  // barriers of all threads
  uint32_t clock = 1;   // counts releases to other blocks
  Clocks known, pending;
  bool fenced = false;
  uint64_t done = 0;                       // instructions
  std::map<uint32_t, MBarrier> mbarriers;  // by address
  std::vector<Bulk> arriving;
  std::map<int, Groups> leaving;  // by thread
  uint32_t engine = 0;            // the clock of all engines
  int engines = 0;                // mbarriers so far
  uint64_t events = 0;            // at barriers of any kind
};

// what was found, told once for all the lanes and places where one instruction does it
struct Finding {
  std::string text;
  int32_t line;
  std::string kind;  // the text without its numbers
  uint64_t more = 0;
};

struct Launch {
  const Program* program;
  std::vector<Buffer> buffers;  // by address
  std::vector<uint32_t> units;  // bytes of an element of each
  std::vector<Shadow> shadows;
  std::vector<uint8_t> parameters;
  uint32_t grid[3], block[3];
  uint32_t shared_bytes;
  Options options;
  Counters counters;
  std::vector<uint64_t> by_opcode;
  std::vector<Finding> findings;
  // of an early launch; each thread waits for it with griddepcontrol.wait
  std::vector<Before> before;
  // griddepcontrol.launch_dependents came before that: the next launch may meet them, too
  bool passes_on = false;
  std::vector<uint64_t> trace;  // sector · 2 + (a store)
  std::map<uint64_t, Clocks> released;
  std::mt19937_64 random;
  size_t last_buffer = 0;

  ~Launch();
  void run();
};

enum class Access { load, store, atomic };

// the bytes at a shared or global address if a lane may have them, else null; what is wrong is
// reported
uint8_t* shared_at(Warp& w, int lane, uint32_t address, uint32_t bytes, Access access, const char* what,
                   const void* value = nullptr);
uint8_t* global_at(Warp& w, int lane, uint64_t address, uint32_t bytes, Access access, const char* what);

// counted: the sectors of 32 bytes that one request touches; the passes that shared memory takes
// for it
void count_global(Warp& w, const uint64_t* addresses, Mask mask, uint32_t bytes, bool store);
void count_span(Warp& w, uint64_t address, uint64_t bytes, bool store);
void count_shared(Warp& w, const uint32_t* addresses, Mask mask, uint32_t bytes);

// f(cell, its first byte) for the cells that hold some bytes
template <typename F>
void each_cell(Block& block, uint32_t address, uint32_t bytes, F&& f);

// a cp.async is under way; it lands
void launch_copy(Warp& w, const Copy& copy);
void land(Warp& w, const Copy& copy);
// an asynchronous copy has landed: what it wrote is the warp's at that lane
void landed(Block& block, uint32_t address, uint32_t bytes, Stamp by);
// on its way: the bytes are marked
void mark_travel(Block& block, uint32_t address, uint32_t bytes, Travel travel);
// whether a fence.proxy.async has shown the bytes to the asynchronous proxy; else reported
bool shown_to_proxy(Warp& w, int lane, uint32_t address, uint32_t bytes, const char* what);
// the address in a register (4 or 8 bytes, 0 if there is none) and an offset
inline uint64_t address_of(const Warp& w, int lane, int32_t at, int64_t offset, int64_t bytes) {
  if (bytes == 8) return w.at<uint64_t>(at)[lane] + uint64_t(offset);
  return bytes == 4 ? uint32_t(w.at<uint32_t>(at)[lane] + offset) : uint64_t(offset);
}
// the mbarrier at an address of shared memory, or null, which is reported; what is known to those
// who arrive is kept
MBarrier* mbarrier_at(Warp& w, int lane, uint32_t address, const char* what);
void arrive_at(Warp& w, int lane, MBarrier& m, uint32_t count, const char* what);
// the copies in bulk that an mbarrier waits for land
void land_for(Warp& w, uint32_t mbarrier);
void land_bulk(Block& block, const Bulk& copy, int engine);
// whether it has done more since its last wait at an mbarrier than to try again
inline bool works(const Warp& w) { return w.done - w.waited > 8; }
// the thread ends: what it left under way is reported
void check_left(Warp& w, Mask lanes);
// this warp has synchronised with itself; what its lanes learnt apart is now known to all
void tick(Warp& w);
void gather(Warp& w);
// what one lane learns, and what comes before its accesses
Past& of_lane(Warp& w, int lane);
void join_known(Past& to, const Warp& w, int lane);
// other blocks learn what this one did before, and the reverse
void release(Warp& w, uint64_t address);
void acquire(Warp& w, uint64_t address, bool at_once);
void fence(Warp& w);

// the warp arrives at a barrier; the scheduler lets it go on
void arrive(Warp& w, int barrier, uint32_t wanted, bool waits, const Reduction& reduction = {});

template <typename F>
void each_cell(Block& block, uint32_t address, uint32_t bytes, F&& f) {
  const uint32_t end = address + bytes;
  for (uint32_t i = address / Chunk::BYTES; i * Chunk::BYTES < end; i++) {
    Chunk& chunk = block.chunks[i];
    const uint32_t first = i * Chunk::BYTES;
    const bool covered = address <= first && end >= first + Chunk::BYTES;
    if (covered && chunk.pieces < 0) {
      f(chunk.whole, first);
      continue;
    }
    if (chunk.pieces < 0) {
      chunk.pieces = int32_t(block.pieces.size());
      auto& fresh = block.pieces.emplace_back();
      fresh.fill(chunk.whole);
      for (Cell& cell : fresh) {
        if (cell.readers < 0) continue;
        block.readers.push_back(block.readers[cell.readers]);
        cell.readers = int32_t(block.readers.size()) - 1;
      }
    }
    auto& pieces = block.pieces[chunk.pieces];
    for (uint32_t k = 0; k < Chunk::PIECES; k++) {
      const uint32_t at = first + k * Chunk::PIECE;
      if (at + Chunk::PIECE > address && at < end) f(pieces[k], at);
    }
    // bytes written together are one again
    if (covered && pieces[0].read.clock == 0 && pieces[0].readers < 0) {
      const auto same = [&](const Cell& c) {
        return std::memcmp(&c.write, &pieces[0].write, sizeof c.write) == 0 && c.read.clock == 0 && c.readers < 0 &&
               c.ready == pieces[0].ready && c.arriving == pieces[0].arriving && c.leaving == pieces[0].leaving &&
               c.multiplied == pieces[0].multiplied && c.atomic == pieces[0].atomic;
      };
      bool alike = true;
      for (const Cell& c : pieces) alike = alike && same(c);
      if (alike) {
        chunk.whole = pieces[0];
        chunk.pieces = -1;
      }
    }
  }
}

}  // namespace lk::ptx
