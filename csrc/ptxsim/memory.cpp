// Shared and global memory: bounds, alignment, initialisation, races, and the counts of what
// hardware would move.
#include <sys/mman.h>

#include <algorithm>

#include "block.h"

namespace lk::ptx {

namespace {

std::string thread_of(const Stamp& s) {
  if (s.warp >= ENGINE) return "cp.async.bulk";
  return "warp " + std::to_string(s.warp) + " lane " + std::to_string(s.lane);
}

// whether an earlier access of this block comes before what `lane` of `w` does now
bool ordered(const Warp& w, int lane, const Stamp& s) {
  if (s.warp == w.index && (s.lane == lane || s.clock < w.synced)) return true;
  return w.past.known.covers(s) || (w.apart >> lane & 1 && w.of_lanes[size_t(lane)].known.covers(s));
}

// of two lanes of one warp that read in one interval either stands for both, but not for itself:
// lane LANES is no lane
void add_read(Stamp& last, const Warp& w, int lane) {
  const bool both = last.clock >= w.synced && last.lane != lane;
  last = {w.clock, uint16_t(w.index), uint16_t(both ? LANES : lane)};
}

void note_read(Block& block, Cell& cell, const Warp& w, int lane) {
  if (cell.readers < 0 && (cell.read.clock == 0 || cell.read.warp == w.index)) return add_read(cell.read, w, lane);
  if (cell.readers < 0) {
    if (block.spare.empty()) {
      cell.readers = int32_t(block.readers.size());
      block.readers.push_back({});
    } else {
      cell.readers = block.spare.back();
      block.spare.pop_back();
      block.readers[cell.readers] = {};
    }
    block.readers[cell.readers][cell.read.warp] = cell.read;
  }
  add_read(block.readers[cell.readers][w.index], w, lane);
}

void forget_reads(Block& block, Cell& cell) {
  if (cell.readers >= 0) block.spare.push_back(cell.readers);
  cell.read = {};
  cell.readers = -1;
}

// a reader that does not come before a write of `lane`, or -1
int unordered_reader(const Block& block, const Cell& cell, const Warp& w, int lane) {
  if (cell.readers < 0) return cell.read.clock && !ordered(w, lane, cell.read) ? cell.read.warp : -1;
  for (int i = 0; i < WARPS; i++) {
    const Stamp& s = block.readers[cell.readers][i];
    if (s.clock && !ordered(w, lane, s)) return i;
  }
  return -1;
}

bool before(const Warp& w, int lane, const Mark& m) {
  const Block& block = *w.block;
  if (m.block - 1 != block.index) {
    const auto found = block.known.find(m.block - 1);
    return found != block.known.end() && found->second >= m.release;
  }
  return m.many ? block.passed > m.clock : ordered(w, lane, {m.clock, m.warp, m.lane});
}

Mark mark(const Warp& w, int lane) {
  return {w.block->index + 1, w.clock, w.block->clock, uint16_t(w.index), uint8_t(lane), false, false};
}

Element* element_of(Launch& launch, size_t buffer, uint64_t address) {
  Shadow& shadow = launch.shadows[buffer];
  const Buffer& b = launch.buffers[buffer];
  if (!shadow.elements) {
    shadow.bytes = ((b.last - b.first) / launch.units[buffer] + 1) * sizeof(Element);
    void* pages = mmap(nullptr, shadow.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                       0);
    if (pages == MAP_FAILED) return nullptr;
    shadow.elements = static_cast<Element*>(pages);
  }
  return shadow.elements + (address - b.first) / launch.units[buffer];
}

size_t buffer_of(Launch& launch, uint64_t address) {
  const auto& buffers = launch.buffers;
  const auto holds = [&](size_t i) { return address >= buffers[i].first && address < buffers[i].last; };
  if (launch.last_buffer < buffers.size() && holds(launch.last_buffer)) return launch.last_buffer;
  for (size_t i = 0; i < buffers.size(); i++) {
    if (holds(i)) return launch.last_buffer = i;
  }
  return buffers.size();
}

std::string nearest(const Launch& launch, uint64_t address) {
  const Buffer* near = nullptr;
  const auto distance = [&](const Buffer& b) {
    return address < b.first ? b.first - address : address < b.last ? 0 : address - b.last;
  };
  for (const Buffer& b : launch.buffers) {
    if (!near || distance(b) < distance(*near)) near = &b;
  }
  if (!near) return "no tensor was given";
  const auto offset = int64_t(address - near->first);
  return near->name + (offset < 0 ? "" : "+") + std::to_string(offset) + " of " +
         std::to_string(near->last - near->first) + " bytes";
}

void check_global(Warp& w, int lane, size_t buffer, uint64_t address, uint32_t bytes, Access access, const char* what) {
  Launch& launch = *w.block->launch;
  const Buffer& b = launch.buffers[buffer];
  const uint32_t unit = launch.units[buffer];
  bool fine = true;  // one report an access
  for (uint64_t a = address; a < address + bytes; a += unit) {
    Element* e = element_of(launch, buffer, a);
    if (!e) return;
    const auto conflict = [&](const Mark& m, const char* kind) {
      if (!fine) return;
      fine = false;
      report(w, lane,
             std::string(what) + ": race on " + b.name + "+" + std::to_string(a - b.first) + " with a " + kind +
                 " of block " + std::to_string(m.block - 1) + " warp " + std::to_string(m.warp));
    };
    if (access != Access::store && b.poisoned && !e->written() && fine) {
      fine = false;
      report(w, lane,
             std::string(what) + " reads " + b.name + "+" + std::to_string(a - b.first) + ", which nobody wrote");
    }
    if (e->write.block && !before(w, lane, e->write)) conflict(e->write, "write");
    const bool atomic = access == Access::atomic;
    if (atomic ? !e->read.atomic : e->read.atomic || access == Access::store) {
      if (e->read.block && !before(w, lane, e->read)) conflict(e->read, e->read.atomic ? "atomic" : "read");
      // after atomics a read is not kept: their mark is where it would be
      if (access == Access::load) continue;
      e->read = {};
    }
    if (access == Access::store) {
      e->write = mark(w, lane);
      continue;
    }
    Mark now = mark(w, lane);
    now.atomic = atomic;
    const Mark& old = e->read;
    if (old.block == now.block &&
        (old.many || old.warp != now.warp || (old.lane != now.lane && old.clock >= w.synced))) {
      now.many = true;
      now.clock = w.block->passed;
    }
    e->read = now;
  }
}

// an early launch leaves alone what the one before writes, and does not write what it reads, until
// it has waited
void check_before(Warp& w, int lane, uint64_t address, uint32_t bytes, Access access, const char* what) {
  if (w.past.ended || (w.apart >> lane & 1 && w.of_lanes[size_t(lane)].ended)) return;
  for (const Before& b : w.block->launch->before) {
    if (address >= b.last || address + bytes <= b.first || (access == Access::load && !b.written)) continue;
    return report(w, lane,
                  std::string(what) + (access == Access::load ? " reads " : " writes ") + b.name + "+" +
                      std::to_string(int64_t(address - b.first)) +
                      " of the launch before, without griddepcontrol.wait");
  }
}

}  // namespace

Launch::~Launch() {
  for (Shadow& s : shadows) {
    if (s.elements) munmap(s.elements, s.bytes);
  }
}

void report(const Warp& w, int lane, const std::string& what) {
  Launch& launch = *w.block->launch;
  const int32_t line = w.now ? w.now->line : 0;
  std::string kind;
  std::copy_if(what.begin(), what.end(), std::back_inserter(kind), [](char c) { return c < '0' || c > '9'; });
  for (Finding& f : launch.findings) {
    if (f.line == line && f.kind == kind) {
      f.more++;
      return;
    }
  }
  if (launch.findings.size() >= 32) return;
  const uint32_t* id = w.block->id;
  std::string where = "PTX line " + std::to_string(line) + ", block (" + std::to_string(id[0]) + ", " +
                      std::to_string(id[1]) + ", " + std::to_string(id[2]) + ") warp " + std::to_string(w.index);
  if (lane >= 0) where += " lane " + std::to_string(lane);
  launch.findings.push_back({where + ": " + what, line, kind});
}

uint8_t* shared_at(Warp& w, int lane, uint32_t address, uint32_t bytes, Access access, const char* what,
                   const void* value) {
  Block& block = *w.block;
  if (uint64_t(address) + bytes > block.shared.size()) {
    report(w, lane,
           std::string(what) + ": shared memory out of bounds, " + std::to_string(address) + " + " +
               std::to_string(bytes) + " of " + std::to_string(block.shared.size()) + " bytes");
    return nullptr;
  }
  if (address % std::min(bytes, 16u)) {
    report(w, lane, std::string(what) + ": misaligned shared address " + std::to_string(address));
    return nullptr;
  }
  uint8_t* data = block.shared.data() + address;
  if (!block.launch->options.check) return data;
  bool fine = true;  // one report an access
  const auto wrong = [&](uint32_t at, const std::string& text) {
    if (fine) report(w, lane, std::string(what) + " at " + std::to_string(at) + text);
    fine = false;
  };
  each_cell(block, address, bytes, [&](Cell& cell, uint32_t at) {
    if (cell.arriving) return wrong(at, ": a cp.async into it has not been waited for");
    if (cell.leaving && access != Access::load) {
      return wrong(at, ": a cp.async.bulk out of it has not been waited for");
    }
    if (cell.multiplied && access != Access::load) {
      return wrong(at, ": a wgmma that reads it has not been waited for");
    }
    const bool same = access == Access::store && value && cell.ready && std::memcmp(data, value, bytes) == 0;
    if (cell.write.clock && !ordered(w, lane, cell.write) && !same) {
      return wrong(at, ": shared race with a write of " + thread_of(cell.write));
    }
    if (access != Access::store && !cell.ready) return wrong(at, ": reads shared memory that nobody wrote");
    const bool atomic = access == Access::atomic;
    if (atomic ? !cell.atomic : cell.atomic || access == Access::store) {
      const int other = unordered_reader(block, cell, w, lane);
      if (other >= 0 && !same) {
        return wrong(at, std::string(": shared race with ") + (cell.atomic ? "an atomic" : "a read") + " of warp " +
                             std::to_string(other));
      }
      // after atomics a read is not kept: their warps' marks are where it would be
      if (access == Access::load) return;
      forget_reads(block, cell);
    }
    if (access != Access::store) {
      cell.atomic = atomic;
      return note_read(block, cell, w, lane);
    }
    cell.write = {w.clock, uint16_t(w.index), uint16_t(lane)};
    cell.atomic = false;
    cell.ready = true;
  });
  return data;
}

uint8_t* global_at(Warp& w, int lane, uint64_t address, uint32_t bytes, Access access, const char* what) {
  Launch& launch = *w.block->launch;
  if (address % bytes) {
    report(w, lane,
           std::string(what) + ": misaligned address, " + nearest(launch, address) + " for " + std::to_string(bytes) +
               " bytes");
    return nullptr;
  }
  const size_t found = buffer_of(launch, address);
  if (found == launch.buffers.size() || address + bytes > launch.buffers[found].last) {
    report(w, lane, std::string(what) + ": out of bounds, " + nearest(launch, address));
    return nullptr;
  }
  const Buffer& b = launch.buffers[found];
  if (access != Access::load && !b.writable) {
    report(w, lane, std::string(what) + ": writes " + b.name + ", which is read only");
    return nullptr;
  }
  if (launch.options.check && !launch.before.empty()) check_before(w, lane, address, bytes, access, what);
  if (launch.options.check && b.writable) check_global(w, lane, found, address, bytes, access, what);
  return reinterpret_cast<uint8_t*>(address);
}

void count_global(Warp& w, const uint64_t* addresses, Mask mask, uint32_t bytes, bool store) {
  uint64_t sectors[LANES * 3];  // a lane has up to 64 bytes
  int count = 0;
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    for (uint64_t s = addresses[i] / 32; s <= (addresses[i] + bytes - 1) / 32; s++) sectors[count++] = s;
  }
  std::sort(sectors, sectors + count);
  count = int(std::unique(sectors, sectors + count) - sectors);
  Launch& launch = *w.block->launch;
  Counters& c = launch.counters;
  (store ? c.store_sectors : c.load_sectors) += count;
  (store ? c.store_requests : c.load_requests) += 1;
  (store ? c.store_bytes : c.load_bytes) += uint64_t(__builtin_popcount(mask)) * bytes;
  if (launch.options.trace) {
    for (int i = 0; i < count; i++) launch.trace.push_back(sectors[i] * 2 + store);
  }
}

void count_span(Warp& w, uint64_t address, uint64_t bytes, bool store) {
  Launch& launch = *w.block->launch;
  Counters& c = launch.counters;
  const uint64_t first = address / 32, last = (address + bytes - 1) / 32;
  (store ? c.store_sectors : c.load_sectors) += last - first + 1;
  (store ? c.store_requests : c.load_requests) += 1;
  (store ? c.store_bytes : c.load_bytes) += bytes;
  for (uint64_t s = first; launch.options.trace && s <= last; s++) launch.trace.push_back(s * 2 + store);
}

// Shared memory has 32 banks of 4 bytes and serves one word of each in a pass; a request of more
// than 128 bytes is cut into halves or quarters of the warp.
void count_shared(Warp& w, const uint32_t* addresses, Mask mask, uint32_t bytes) {
  const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  uint64_t passes = 0, ideal = 0;
  for (int first = 0; first < LANES; first += together) {
    uint32_t words[LANES * 2];
    int count = 0;
    for (int i = first; i < first + together; i++) {
      if (!(mask >> i & 1)) continue;
      for (uint32_t k = 0; k < std::max(1u, bytes / 4); k++) words[count++] = addresses[i] / 4 + k;
    }
    if (count == 0) continue;
    std::sort(words, words + count);
    count = int(std::unique(words, words + count) - words);
    int banks[32] = {}, most = 0;
    for (int i = 0; i < count; i++) most = std::max(most, ++banks[words[i] % 32]);
    passes += most;
    ideal += (count + 31) / 32;
  }
  w.block->launch->counters.shared_wavefronts += passes;
  w.block->launch->counters.shared_ideal += ideal;
}

void launch_copy(Warp& w, const Copy& copy) {
  Block& block = *w.block;
  mark_travel(block, copy.to, copy.bytes, Travel::arriving);
  if (!block.launch->options.late) {
    std::memcpy(block.shared.data() + copy.to, reinterpret_cast<const void*>(copy.from), copy.taken);
  }
  w.open.push_back(copy);
}

void land(Warp& w, const Copy& copy) {
  Block& block = *w.block;
  std::memcpy(block.shared.data() + copy.to, reinterpret_cast<const void*>(copy.from), copy.taken);
  std::memset(block.shared.data() + copy.to + copy.taken, 0, copy.bytes - copy.taken);
  landed(block, copy.to, copy.bytes, {w.clock, uint16_t(w.index), uint16_t(copy.lane)});
}

void landed(Block& block, uint32_t address, uint32_t bytes, Stamp by) {
  if (!block.launch->options.check) return;
  each_cell(block, address, bytes, [&](Cell& cell, uint32_t) {
    forget_reads(block, cell);
    cell = Cell{};
    cell.write = by;
    cell.ready = true;
  });
}

void mark_travel(Block& block, uint32_t address, uint32_t bytes, Travel travel) {
  if (!block.launch->options.check) return;
  each_cell(block, address, bytes, [&](Cell& cell, uint32_t) {
    if (travel == Travel::arriving) cell.arriving = true;
    if (travel == Travel::leaves) cell.leaving++;
    if (travel == Travel::left && cell.leaving) cell.leaving--;
    if (travel == Travel::multiplies) cell.multiplied++;
    if (travel == Travel::multiplied && cell.multiplied) cell.multiplied--;
  });
}

bool shown_to_proxy(Warp& w, int lane, uint32_t address, uint32_t bytes, const char* what) {
  bool fine = true;
  if (!w.block->launch->options.check) return fine;
  each_cell(*w.block, address, bytes, [&](Cell& cell, uint32_t at) {
    const Stamp& by = cell.write;
    if (!fine || !by.clock || by.warp >= ENGINE || w.past.proxied.covers(by)) return;
    if (w.apart >> lane & 1 && w.of_lanes[size_t(lane)].proxied.covers(by)) return;
    fine = false;
    report(
        w, lane,
        std::string(what) + " at " + std::to_string(at) + ": no fence.proxy.async after the write of " + thread_of(by));
  });
  return fine;
}

void release(Warp& w, uint64_t address) {
  Block& block = *w.block;
  Clocks& there = block.launch->released[address];
  join(there, block.known);
  there[block.index] = block.clock++;
}

void acquire(Warp& w, uint64_t address, bool at_once) {
  Block& block = *w.block;
  const auto found = block.launch->released.find(address);
  if (found != block.launch->released.end()) join(at_once ? block.known : block.pending, found->second);
}

void fence(Warp& w) {
  Block& block = *w.block;
  block.fenced = true;
  join(block.known, block.pending);
}

}  // namespace lk::ptx
