// Copies in bulk, by the asynchronous proxy, and the maps of tensors that they go by. PTX ISA
// 9.7.9.25 cp.async.bulk, cp.async.bulk.tensor; 9.7.9.26 tensormap.replace; 5.5 tensors, tiles and
// swizzles. A copy into shared memory lands when its mbarrier is waited for, one out of it when its
// group is; else at once (Options::late). Until then its bytes are marked as on their way.
#include "block.h"

namespace lk::ptx {

namespace {

constexpr int RANK = 5;
constexpr uint32_t MAP_BYTES = 128;

// 128 bytes that hardware keeps in a form of its own; ptxsim/tensor_map.py makes the same
struct TensorMap {
  uint64_t magic, address;
  uint8_t rank, type, swizzle, interleave, fill, unused[3];
  uint32_t sizes[RANK];
  uint16_t box[RANK], steps[RANK];
  uint64_t strides[RANK - 1];  // in bytes, of all but the innermost
};
static_assert(sizeof(TensorMap) <= MAP_BYTES);
constexpr uint64_t MAGIC = 0x70616d726f736e74;

enum Field { ADDRESS, RANKS, BOX, SIZES, STRIDES, STEPS, TYPE, INTERLEAVE, SWIZZLE, FILL };

const uint8_t TYPE_BYTES[] = {1, 2, 4, 4, 8, 8, 2,
                              // u8 u16 u32 s32 u64 s64 f16 f32 ftz f64 bf16 tf32
                              4, 4, 8, 2, 4, 4};

uint32_t in_shared(uint64_t address) { return uint32_t(address >= SHARED_WINDOW ? address - SHARED_WINDOW : address); }

// tensormap.replace: the address, the value; immediates: offset, bytes of the register, field,
// ordinal, whether shared
void replace(Warp& w, const Instruction& in, Mask mask) {
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    const uint64_t address = address_of(w, i, in.at[0], in.with[0], in.with[1]);
    const bool shared = in.with[4] || address >= SHARED_WINDOW;
    uint8_t* at = nullptr;
    const auto reach = [&](Access access) {
      for (uint32_t k = 0; k < MAP_BYTES; k += 16) {
        uint8_t* found = shared ? shared_at(w, i, in_shared(address) + k, 16, access, "tensormap.replace")
                                : global_at(w, i, address + k, 16, access, "tensormap.replace");
        if (!found) return false;
        if (k == 0) at = found;
      }
      return true;
    };
    if (address % MAP_BYTES) return report(w, i, "tensormap.replace: the map must be aligned to 128 bytes");
    if (!reach(Access::load) || !reach(Access::store)) return;
    TensorMap m;
    std::memcpy(&m, at, sizeof m);
    m.magic = MAGIC;
    const uint64_t value = w.at<uint64_t>(in.at[1])[i];
    const auto k = size_t(in.with[3]);
    switch (Field(in.with[2])) {
      case ADDRESS: m.address = value; break;
      case RANKS: m.rank = uint8_t(value); break;
      case BOX: m.box[k] = uint16_t(value); break;
      case SIZES: m.sizes[k] = uint32_t(value); break;
      case STRIDES: m.strides[k] = value; break;
      case STEPS: m.steps[k] = uint16_t(value); break;
      case TYPE: m.type = uint8_t(value); break;
      case INTERLEAVE: m.interleave = uint8_t(value); break;
      case SWIZZLE: m.swizzle = uint8_t(value); break;
      case FILL: m.fill = uint8_t(value); break;
    }
    std::memcpy(at, &m, sizeof m);
  }
}

// tensormap.cp_fenceproxy, by the warp: the global address, the shared one; immediates: their
// offsets and registers' bytes
void publish(Warp& w, const Instruction& in, Mask mask) {
  if (mask != w.live) report(w, -1, "tensormap.cp_fenceproxy: not all lanes of the warp are here");
  const uint64_t to = address_of(w, 0, in.at[0], in.with[0], in.with[1]);
  const uint32_t from = in_shared(address_of(w, 0, in.at[1], in.with[2], in.with[3]));
  for (uint32_t k = 0; k < MAP_BYTES; k += 16) {
    const uint8_t* held = shared_at(w, 0, from + k, 16, Access::load, "tensormap.cp_fenceproxy");
    uint8_t* at = global_at(w, 0, to + k, 16, Access::store, "tensormap.cp_fenceproxy");
    if (held && at) std::memcpy(at, held, 16);
  }
  fence(w);
}

bool map_at(Warp& w, int lane, uint64_t address, TensorMap& m) {
  const auto& held = w.block->launch->parameters;
  if (address >= PARAMETER_WINDOW && address - PARAMETER_WINDOW + MAP_BYTES <= held.size()) {
    std::memcpy(&m, held.data() + (address - PARAMETER_WINDOW), sizeof m);
  } else {
    for (uint32_t k = 0; k < MAP_BYTES; k += 16) {
      if (!global_at(w, lane, address + k, 16, Access::load, "tensor map")) return false;
    }
    std::memcpy(&m, reinterpret_cast<const void*>(address), sizeof m);
  }
  const auto wrong = [&](const std::string& text) {
    report(w, lane, "tensor map: " + text);
    return false;
  };
  if (address % 64 || m.magic != MAGIC) return wrong("there is none");
  if (m.rank >= RANK || m.type >= sizeof TYPE_BYTES || m.swizzle > 3)
    return wrong("its rank, type or swizzle is unknown");
  if (m.interleave) return wrong("interleaved layouts are not simulated");
  if (m.address % 16) return wrong("its address must be a multiple of 16 bytes");
  const uint32_t row = m.box[0] * TYPE_BYTES[m.type], span = m.swizzle ? 16u << m.swizzle : 0;
  if (row % 16) return wrong("a row of its box has " + std::to_string(row) + " bytes, which must be a multiple of 16");
  if (span && row > span) {
    return wrong("a row of its box has " + std::to_string(row) + " bytes, its swizzle is of " + std::to_string(span));
  }
  for (int d = 0; d <= m.rank; d++) {
    if (m.box[d] < 1 || m.box[d] > 256) return wrong("its box has " + std::to_string(m.box[d]) + " elements in a row");
    if (m.steps[d] != 1) return wrong("steps other than 1 are not simulated");
    if (d && m.strides[d - 1] % 16) return wrong("its strides must be multiples of 16 bytes");
  }
  return true;
}

// some bytes of a tensor that a copy reads or writes
bool touch(Warp& w, int lane, uint64_t address, uint32_t bytes, uint32_t unit, Access access, const char* what) {
  if (address % 16 == 0 && bytes == 16) return global_at(w, lane, address, 16, access, what) != nullptr;
  for (uint32_t k = 0; k < bytes; k += unit) {
    if (!global_at(w, lane, address + k, unit, access, what)) return false;
  }
  return true;
}

// a box of a tensor at some coordinates as pieces of 16 bytes of shared memory; what lies outside
// of the tensor is zero
std::vector<Piece> box_of(Warp& w, int lane, const TensorMap& m, const int32_t (&first)[RANK], uint32_t shared,
                          bool store, const char* what) {
  const uint32_t unit = TYPE_BYTES[m.type], row = m.box[0] * unit;
  const uint32_t exchanged = m.swizzle ? ((16u << m.swizzle) - 16) & 0x70 : 0;
  uint64_t rows = 1;
  for (int d = 1; d <= m.rank; d++) rows *= m.box[d];
  std::vector<Piece> pieces;
  for (uint64_t r = 0; r < rows; r++) {
    uint64_t address = m.address, rest = r;
    bool inside = true;
    for (int d = 1; d <= m.rank; d++) {
      const int64_t at = first[d] + int64_t(rest % m.box[d]);
      rest /= m.box[d];
      inside = inside && at >= 0 && at < int64_t(m.sizes[d]);
      address += uint64_t(at) * m.strides[d - 1];
    }
    const int64_t begin = std::max<int64_t>(0, first[0]), end = std::min<int64_t>(m.sizes[0], first[0] + m.box[0]);
    if (inside && begin < end) count_span(w, address + uint64_t(begin) * unit, uint32_t(end - begin) * unit, store);
    for (uint32_t k = 0; k < row; k += 16) {
      const uint32_t plain = shared + uint32_t(r) * row + k, at = plain ^ (plain >> 3 & exchanged);
      const int64_t from = std::max<int64_t>(begin, first[0] + int64_t(k / unit));
      const int64_t to = std::min<int64_t>(end, first[0] + int64_t((k + 16) / unit));
      Piece p{at};
      if (inside && from < to) {
        p.skip = uint32_t(from - first[0]) * unit - k;
        p.bytes = uint32_t(to - from) * unit;
        p.global = address + uint64_t(from) * unit;
        if (!touch(w, lane, p.global, p.bytes, unit, store ? Access::store : Access::load, what)) p.bytes = 0;
      }
      pieces.push_back(p);
    }
  }
  return pieces;
}

// whether shared memory could hold them: no loop runs over what cannot be there
bool fits(Warp& w, int lane, uint64_t bytes, const char* what) {
  const uint64_t most = w.block->shared.size();
  if (bytes <= most) return true;
  report(w, lane,
         std::string(what) + ": shared memory out of bounds, " + std::to_string(bytes) + " bytes of " +
             std::to_string(most));
  return false;
}

// bytes that follow one another
std::vector<Piece> line_of(Warp& w, int lane, uint64_t global, uint32_t shared, uint32_t bytes, bool store,
                           const char* what) {
  std::vector<Piece> pieces;
  if (global % 16 || shared % 16 || bytes % 16) {
    report(w, lane, std::string(what) + ": addresses and size must be multiples of 16 bytes");
    return pieces;
  }
  if (!fits(w, lane, bytes, what)) return pieces;
  count_span(w, global, bytes, store);
  for (uint32_t k = 0; k < bytes; k += 16) {
    const bool there = touch(w, lane, global + k, 16, 16, store ? Access::store : Access::load, what);
    pieces.push_back({shared + k, 16, 0, there ? 16u : 0u, global + k});
  }
  return pieces;
}

// The operands after the addresses: the coordinates of a tensor's box, or the size of a line.
// Immediates: offset and register's bytes of the shared address, the same of the global one, the
// same of the mbarrier, the tensor's rank (0: a line).
bool pieces_of(Warp& w, const Instruction& in, int lane, int operand, bool store, const char* what,
               std::vector<Piece>& to) {
  const auto shared = uint32_t(address_of(w, lane, in.at[0], in.with[0], in.with[1]));
  const uint64_t global = address_of(w, lane, in.at[1], in.with[2], in.with[3]);
  const auto rank = int(in.with[6]);
  if (rank == 0) {
    to = line_of(w, lane, global, shared, w.at<uint32_t>(in.at[operand])[lane], store, what);
    return !to.empty();
  }
  TensorMap m;
  if (!map_at(w, lane, global, m)) return false;
  if (m.rank + 1 != rank) {
    report(w, lane, std::string(what) + ": the tensor has " + std::to_string(m.rank + 1) + " dimensions");
    return false;
  }
  if (shared % 128) {
    report(w, lane, std::string(what) + ": misaligned shared address " + std::to_string(shared));
    return false;
  }
  uint64_t bytes = TYPE_BYTES[m.type];
  for (int d = 0; d < rank; d++) bytes *= m.box[d];
  if (!fits(w, lane, bytes, what)) return false;
  int32_t first[RANK] = {};
  for (int d = 0; d < rank; d++) first[d] = w.at<int32_t>(in.at[operand + d])[lane];
  to = box_of(w, lane, m, first, shared, store, what);
  return true;
}

// shared address, global address or map, mbarrier, coordinates or size
void load(Warp& w, const Instruction& in, Mask mask) {
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    Bulk copy{{}, uint32_t(address_of(w, i, in.at[2], in.with[4], in.with[5]))};
    if (!mbarrier_at(w, i, copy.mbarrier, "cp.async.bulk")) continue;
    if (!pieces_of(w, in, i, 3, false, "cp.async.bulk", copy.pieces)) continue;
    bool fine = true;
    for (const Piece& p : copy.pieces) fine = fine && shared_at(w, i, p.shared, 16, Access::store, "cp.async.bulk");
    if (!fine) continue;
    for (const Piece& p : copy.pieces) mark_travel(*w.block, p.shared, 16, Travel::arriving);
    copy.bytes = int64_t(copy.pieces.size()) * 16;
    const uint32_t mbarrier = copy.mbarrier;
    w.block->arriving.push_back(std::move(copy));
    if (!w.block->launch->options.late) land_for(w, mbarrier);
  }
}

void send(Warp& w, int lane, const Bulk& copy) {
  for (const Piece& p : copy.pieces) {
    mark_travel(*w.block, p.shared, 16, Travel::left);
    const uint8_t* from = shared_at(w, lane, p.shared, 16, Access::load, "cp.async.bulk");
    if (from) std::memcpy(reinterpret_cast<void*>(p.global), from + p.skip, p.bytes);
  }
}

// shared address, global address or map, coordinates or size
void store(Warp& w, const Instruction& in, Mask mask) {
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    Bulk copy;
    if (!pieces_of(w, in, i, 2, true, "cp.async.bulk", copy.pieces)) continue;
    bool fine = true;
    for (const Piece& p : copy.pieces) {
      fine = fine && shared_at(w, i, p.shared, 16, Access::load, "cp.async.bulk") &&
             shown_to_proxy(w, i, p.shared, 16, "cp.async.bulk");
    }
    if (!fine) continue;
    for (const Piece& p : copy.pieces) mark_travel(*w.block, p.shared, 16, Travel::leaves);
    if (w.block->launch->options.late) w.block->leaving[w.index * LANES + i].open.push_back(std::move(copy));
    else send(w, i, copy);
  }
}

void commit(Warp& w, const Instruction&, Mask mask) {
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    Groups& groups = w.block->leaving[w.index * LANES + i];
    groups.committed.push_back(std::move(groups.open));
    groups.open.clear();
  }
}

// by its thread; immediate: the groups that may be left
void wait_group(Warp& w, const Instruction& in, Mask mask) {
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    Groups& groups = w.block->leaving[w.index * LANES + i];
    while (groups.committed.size() > size_t(in.with[0])) {
      for (const Bulk& copy : groups.committed.front()) send(w, i, copy);
      groups.committed.erase(groups.committed.begin());
    }
  }
}

// cp.async.mbarrier.arrive: the mbarrier; immediates: offset, register's bytes, whether the arrival
// is among those awaited
void arrive_after_copies(Warp& w, const Instruction& in, Mask mask) {
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    const auto at = uint32_t(address_of(w, i, in.at[0], in.with[0], in.with[1]));
    MBarrier* m = mbarrier_at(w, i, at, "cp.async.mbarrier.arrive");
    if (!m) continue;
    if (!in.with[2]) m->pending++;
    Bulk copies{{}, at, 0, 1};
    const auto take = [&](std::vector<Copy>& from) {
      std::vector<Copy> rest;
      for (const Copy& c : from) {
        if (c.lane != i) rest.push_back(c);
        else copies.pieces.push_back({c.to, c.bytes, 0, c.taken, c.from});
      }
      from = std::move(rest);
    };
    for (auto& group : w.committed) take(group);
    take(w.open);
    join_known(m->arrived, w, i);
    w.block->arriving.push_back(std::move(copies));
    if (!w.block->launch->options.late) land_for(w, at);
  }
}

void fence_proxy(Warp& w, const Instruction&, Mask mask) {
  const auto show = [&](Past& past, Mask lanes) {
    past.proxied.join(past.known);
    past.proxied.join(w.past.known);
    past.proxied.clock[size_t(w.index)] = std::max(past.proxied.clock[size_t(w.index)], w.synced - 1);
    past.proxied.add_lanes(size_t(w.index), w.clock, lanes);
  };
  if (mask == w.live) show(w.past, ALL);
  for (int i = 0; i < LANES; i++) {
    const Mask lane = Mask{1} << i;
    if ((mask == w.live ? w.apart : mask) & lane) show(of_lane(w, i), lane);
  }
  w.clock++;
}

const Table entries{
    {"tensormap.replace", "*", replace, Flow::none},
    {"tensormap.cp_fenceproxy", "*", publish, Flow::together},
    {"fence.proxy.tensormap", "*", [](Warp& w, const Instruction&, Mask) { fence(w); }, Flow::none},
    {"fence.proxy.async", "=", fence_proxy, Flow::none},
    {"cp.async.bulk.load", "*", load, Flow::none},
    {"cp.async.bulk.store", "*", store, Flow::none},
    {"cp.async.bulk.commit_group", "=", commit, Flow::none},
    {"cp.async.bulk.wait_group", "=i", wait_group, Flow::none},
    {"cp.async.mbarrier.arrive", "*", arrive_after_copies, Flow::none},
    {"setmaxnreg", "=i", nothing, Flow::together},
};

}  // namespace

void land_bulk(Block& block, const Bulk& copy, int engine) {
  block.engine++;
  for (const Piece& p : copy.pieces) {
    uint8_t* to = block.shared.data() + p.shared;
    std::memset(to, 0, p.size);
    std::memcpy(to + p.skip, reinterpret_cast<const void*>(p.global), p.bytes);
    landed(block, p.shared, p.size, {block.engine, uint16_t(engine), LANES});
  }
}

void check_left(Warp& w, Mask lanes) {
  for (int i = 0; i < LANES; i++) {
    const auto found = w.block->leaving.find(w.index * LANES + i);
    if (!(lanes >> i & 1) || found == w.block->leaving.end()) continue;
    bool waited = found->second.open.empty();
    for (const auto& group : found->second.committed) waited = waited && group.empty();
    if (!waited) report(w, i, "exit: a cp.async.bulk out of shared memory has not been waited for");
  }
}

}  // namespace lk::ptx
