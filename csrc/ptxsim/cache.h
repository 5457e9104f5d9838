#pragma once
#include <cstddef>
#include <cstdint>

namespace lk::ptx {

constexpr uint64_t SECTOR = 32;

struct Traffic {
  uint64_t read = 0, written = 0;  // bytes
};

// A cache of `capacity` bytes in lines of up to 32 sectors; the least recently used line goes. A
// load that misses reads one sector, a store reads nothing, and what was stored is written when its
// line goes, at the latest at the end.
// trace: a sector's number times 2, and 1 for a store.
Traffic through_cache(const uint64_t* trace, size_t count, uint64_t capacity, uint64_t line_bytes);

}  // namespace lk::ptx
