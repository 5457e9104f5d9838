// What a second-level cache lets through to memory, from the sectors that a launch touched.
#include "cache.h"

#include <list>
#include <unordered_map>

namespace lk::ptx {

Traffic through_cache(const uint64_t* trace, size_t count, uint64_t capacity, uint64_t line_bytes) {
  struct Line {
    uint64_t number;
    uint32_t valid, dirty;  // a bit a sector
  };
  const uint64_t sectors = line_bytes / SECTOR, lines = capacity / line_bytes;
  std::list<Line> used;  // the latest first
  std::unordered_map<uint64_t, std::list<Line>::iterator> places;
  Traffic traffic;
  const auto write_back = [&](const Line& line) {
    traffic.written += uint64_t(__builtin_popcount(line.dirty)) * SECTOR;
  };
  for (size_t i = 0; i < count; i++) {
    const uint64_t sector = trace[i] / 2, number = sector / sectors;
    const uint32_t bit = uint32_t{1} << (sector % sectors);
    const auto found = places.find(number);
    if (found != places.end()) {
      used.splice(used.begin(), used, found->second);
    } else {
      if (places.size() >= lines) {
        write_back(used.back());
        places.erase(used.back().number);
        used.pop_back();
      }
      used.push_front({number, 0, 0});
      places[number] = used.begin();
    }
    Line& line = used.front();
    if (trace[i] & 1) {
      line.dirty |= bit;
    } else if (!(line.valid & bit)) {
      traffic.read += SECTOR;
    }
    line.valid |= bit;
  }
  for (const Line& line : used) write_back(line);
  return traffic;
}

}  // namespace lk::ptx
