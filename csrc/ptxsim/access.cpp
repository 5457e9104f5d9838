// Loads, stores, atomics, asynchronous copies and fences.
// PTX ISA 9.7.9 (ld, st, cp.async, cvta), 9.7.13 (atom, red, membar, fence).
#include <algorithm>

#include "block.h"
#include "numbers.h"

namespace lk::ptx {

namespace {

enum Space : int64_t { GENERIC, GLOBAL, SHARED, LOCAL, PARAM, CONST };
enum Order : int64_t { WEAK = 0, RELAXED = 1, ACQUIRE = 2, RELEASE = 4 };

// the immediates of a memory instruction, as the decoder writes them
struct Form {
  Space space;
  int64_t offset;
  int64_t address_bytes;   // of the register that holds the address: 4, 8, or 0 if there is none
  int64_t bytes;           // of an element
  int64_t register_bytes;  // of a register that holds one
  bool is_signed;
  int64_t order;
  int64_t count;  // elements
};
Form form(const Instruction& in) {
  const int64_t* v = in.with;
  return {Space(v[0]), v[1], v[2], v[3], v[4], v[5] != 0, v[6], v[7]};
}

void addresses(const Warp& w, int32_t at, const Form& f, uint64_t (&to)[LANES]) {
  if (f.address_bytes == 8) {
    for (int i = 0; i < LANES; i++) to[i] = w.at<uint64_t>(at)[i] + f.offset;
  } else if (f.address_bytes == 4) {
    for (int i = 0; i < LANES; i++) to[i] = uint32_t(w.at<uint32_t>(at)[i] + f.offset);
  } else {
    for (int i = 0; i < LANES; i++) to[i] = f.offset;
  }
}

// what a generic address means; the rest of it is returned
Space resolve(Space space, uint64_t& address) {
  if (space != GENERIC) return space;
  if (address >= SHARED_WINDOW) {
    address -= SHARED_WINDOW;
    return SHARED;
  }
  if (address >= LOCAL_WINDOW) {
    address -= LOCAL_WINDOW;
    return LOCAL;
  }
  if (address >= PARAMETER_WINDOW) {
    address -= PARAMETER_WINDOW;
    return PARAM;
  }
  return GLOBAL;
}

uint8_t* local_at(Warp& w, int lane, uint64_t address, uint64_t bytes, const char* what) {
  const uint64_t size = w.block->launch->program->local_bytes;
  if (address > size || bytes > size - address) {
    report(w, lane, std::string(what) + ": local memory out of bounds");
    return nullptr;
  }
  if (address % bytes) {
    report(w, lane, std::string(what) + ": misaligned local address");
    return nullptr;
  }
  return w.block->local.data() + (w.index * LANES + lane) * size + address;
}

uint8_t* parameter_at(Warp& w, int lane, uint64_t address, uint64_t bytes, Access access, const char* what) {
  auto& held = w.block->launch->parameters;
  if (access == Access::load && address <= held.size() && bytes <= held.size() - address) return held.data() + address;
  report(w, lane, std::string(what) + ": out of bounds of the parameters, or writes them");
  return nullptr;
}

void count(Warp& w, Space space, const uint64_t (&a)[LANES], Mask mask, uint32_t bytes, bool store) {
  if (space == GLOBAL || (space == GENERIC && mask && a[__builtin_ctz(mask)] < PARAMETER_WINDOW)) {
    count_global(w, a, mask, bytes, store);
  } else if (space == SHARED || (mask && a[__builtin_ctz(mask)] >= SHARED_WINDOW)) {
    uint32_t narrow[LANES];
    for (int i = 0; i < LANES; i++) narrow[i] = uint32_t(a[i]);
    count_shared(w, narrow, mask, bytes);
  }
}

uint8_t* reach(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes, Access access, const char* what,
               const void* value = nullptr) {
  switch (resolve(space, address)) {
    case SHARED: return shared_at(w, lane, uint32_t(address), bytes, access, what, value);
    case LOCAL: return local_at(w, lane, address, bytes, what);
    case PARAM: return parameter_at(w, lane, address, bytes, access, what);
    default: return global_at(w, lane, address, bytes, access, what);
  }
}

// ld: operands are the registers, then the address
void load(Warp& w, const Instruction& in, Mask mask) {
  const Form f = form(in);
  const auto bytes = uint32_t(f.bytes * f.count);
  const auto put = [&](int64_t k, int lane, const uint8_t* from) {
    uint64_t value = 0;
    if (from) std::memcpy(&value, from, f.bytes);
    if (f.is_signed && f.bytes < 8) {
      const int rest = 64 - 8 * int(f.bytes);
      value = uint64_t(int64_t(value << rest) >> rest);
    }
    std::memcpy(w.at<uint8_t>(in.at[k]) + lane * f.register_bytes, &value, f.register_bytes);
  };
  if (f.space == PARAM) {
    const auto& held = w.block->launch->parameters;
    if (f.offset < 0 || uint64_t(f.offset) + bytes > held.size()) return report(w, -1, "ld.param: out of bounds");
    for (int64_t k = 0; k < f.count; k++) {
      for (int i = 0; i < LANES; i++) {
        if (mask >> i & 1) put(k, i, held.data() + f.offset + k * f.bytes);
      }
    }
    return;
  }
  uint64_t a[LANES];
  addresses(w, in.at[f.count], f, a);
  if (mask) count(w, f.space, a, mask, bytes, false);
  const Access access = f.order & (RELAXED | ACQUIRE) ? Access::atomic : Access::load;
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    const uint8_t* from = reach(w, i, f.space, a[i], bytes, access, "ld");
    if (access == Access::atomic) acquire(w, a[i], f.order & ACQUIRE);
    for (int64_t k = 0; k < f.count; k++) put(k, i, from ? from + k * f.bytes : nullptr);
  }
}

// st: operands are the address, then the registers
void store(Warp& w, const Instruction& in, Mask mask) {
  const Form f = form(in);
  const auto bytes = uint32_t(f.bytes * f.count);
  uint64_t a[LANES];
  addresses(w, in.at[0], f, a);
  if (mask) count(w, f.space, a, mask, bytes, true);
  const Access access = f.order & (RELAXED | RELEASE) ? Access::atomic : Access::store;
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    // an earlier fence does not cover it
    if (access == Access::store && f.space <= GLOBAL) w.block->fenced = false;
    uint8_t value[64];
    for (int64_t k = 0; k < f.count; k++) {
      std::memcpy(value + k * f.bytes, w.at<uint8_t>(in.at[1 + k]) + i * f.register_bytes, f.bytes);
    }
    uint8_t* to = reach(w, i, f.space, a[i], bytes, access, "st", value);
    if (access == Access::atomic && (f.order & RELEASE || w.block->fenced)) release(w, a[i]);
    if (to) std::memcpy(to, value, bytes);
  }
}

// atom: operands are the result, the address, one or two values; red has no result
template <typename T, bool RESULT, typename F>
void atomic(Warp& w, const Instruction& in, Mask mask, F&& f) {
  const Form how = form(in);
  uint64_t a[LANES];
  const int32_t* at = in.at + RESULT;
  addresses(w, at[0], how, a);
  if (mask) count(w, how.space, a, mask, sizeof(T), true);
  w.block->launch->counters.atomics += __builtin_popcount(mask);
  const T *x = w.at<T>(at[1]), *y = w.at<T>(at[how.count > 1 ? 2 : 1]);
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    uint8_t* place = reach(w, i, how.space, a[i], sizeof(T), Access::atomic, "atom");
    if (!place) continue;
    if (how.order & RELEASE || w.block->fenced) release(w, a[i]);
    acquire(w, a[i], how.order & ACQUIRE);
    T old, now;
    std::memcpy(&old, place, sizeof old);
    now = f(old, x[i], y[i]);
    std::memcpy(place, &now, sizeof now);
    if (RESULT) w.at<T>(in.at[0])[i] = old;
  }
}

#define ATOM(name, T, value)                                                                                     \
  {"atom." name, "*",                                                                                            \
   [](Warp& w, const Instruction& in, Mask m) {                                                                  \
     atomic<T, true>(w, in, m,                                                                                   \
                     []([[maybe_unused]] T x, [[maybe_unused]] T y, [[maybe_unused]] T z) { return T(value); }); \
   },                                                                                                            \
   Flow::none}
#define ATOMIC(name, T, value)                                                                                         \
  ATOM(name, T, value), {                                                                                              \
    "red." name, "*",                                                                                                  \
        [](Warp& w, const Instruction& in, Mask m) {                                                                   \
          atomic<T, false>(w, in, m,                                                                                   \
                           []([[maybe_unused]] T x, [[maybe_unused]] T y, [[maybe_unused]] T z) { return T(value); }); \
        },                                                                                                             \
        Flow::none                                                                                                     \
  }

uint32_t add_halves(uint32_t x, uint32_t y, float (*from)(uint16_t), uint16_t (*to)(float)) {
  return uint32_t(to(from(uint16_t(x)) + from(uint16_t(y)))) |
         uint32_t(to(from(uint16_t(x >> 16)) + from(uint16_t(y >> 16)))) << 16;
}
uint16_t f16_of(float v) { return to_f16(v); }

// cp.async: the shared address, the global one, how many bytes come from memory; immediates: both
// offsets, the size, whether the third operand is there, the bytes of the registers that hold the
// addresses
void copy_async(Warp& w, const Instruction& in, Mask mask) {
  const int64_t *v = in.with, bytes = v[2];
  const Form to{SHARED, v[0], v[4], 0, 0, false, 0, 0}, from{GLOBAL, v[1], v[5], 0, 0, false, 0, 0};
  uint64_t a[LANES], g[LANES];
  addresses(w, in.at[0], to, a);
  addresses(w, in.at[1], from, g);
  uint32_t narrow[LANES], taken[LANES];
  Mask reads = 0;
  for (int i = 0; i < LANES; i++) {
    narrow[i] = uint32_t(a[i]);
    taken[i] = v[3] ? std::min<uint32_t>(w.at<uint32_t>(in.at[2])[i], uint32_t(bytes)) : uint32_t(bytes);
    if (taken[i] && mask >> i & 1) reads |= Mask{1} << i;
  }
  if (mask) count_shared(w, narrow, mask, uint32_t(bytes));
  if (reads) count_global(w, g, reads, uint32_t(bytes), false);
  for (int i = 0; i < LANES; i++) {
    if (!(mask >> i & 1)) continue;
    const auto readable = [&](uint64_t address, uint32_t size) {
      return global_at(w, i, address, size, Access::load, "cp.async") != nullptr;
    };
    // of a copy that is cut short only what it takes must be there
    const bool whole = taken[i] == uint32_t(bytes);
    if (taken[i] && !(whole ? readable(g[i], taken[i]) : readable(g[i], 1) && readable(g[i] + taken[i] - 1, 1)))
      taken[i] = 0;
    if (!shared_at(w, i, narrow[i], uint32_t(bytes), Access::store, "cp.async")) continue;
    launch_copy(w, {narrow[i], uint32_t(bytes), taken[i], g[i], i});
  }
}

void commit(Warp& w, const Instruction&, Mask) {
  w.committed.push_back(std::move(w.open));
  w.open.clear();
}
void wait_for(Warp& w, size_t left) {
  while (w.committed.size() > left) {
    for (const Copy& copy : w.committed.front()) land(w, copy);
    w.committed.erase(w.committed.begin());
  }
}

// a shared address in another block of the cluster, which has one: the result, the address, the
// block's rank
template <typename T>
void mapa(Warp& w, const Instruction& in, Mask mask) {
  const T* x = w.at<T>(in.at[1]);
  for (int i = 0; i < LANES; i++) {
    if (mask >> i & 1 && w.at<uint32_t>(in.at[2])[i] != 0) report(w, i, "mapa: of a block that its cluster has not");
  }
  each(w.at<T>(in.at[0]), mask, [&](int i) { return x[i]; });
}

const Table entries{
    {"ld", "*", load, Flow::none},
    {"st", "*", store, Flow::none},
    ATOMIC("add.u32", uint32_t, x + y),
    ATOMIC("add.s32", uint32_t, x + y),
    ATOMIC("add.u64", uint64_t, x + y),
    ATOMIC("add.s64", uint64_t, x + y),
    ATOMIC("add.f32", float, x + y),
    ATOMIC("add.f64", double, x + y),
    ATOMIC("add.f16", uint16_t, to_f16(from_f16(x) + from_f16(y))),
    ATOMIC("add.bf16", uint16_t, to_bf16(from_bf16(x) + from_bf16(y))),
    ATOMIC("add.f16x2", uint32_t, add_halves(x, y, from_f16, f16_of)),
    ATOMIC("add.bf16x2", uint32_t, add_halves(x, y, from_bf16, to_bf16)),
    ATOMIC("min.u32", uint32_t, std::min(x, y)),
    ATOMIC("min.s32", int32_t, std::min(x, y)),
    ATOMIC("min.u64", uint64_t, std::min(x, y)),
    ATOMIC("min.s64", int64_t, std::min(x, y)),
    ATOMIC("max.u32", uint32_t, std::max(x, y)),
    ATOMIC("max.s32", int32_t, std::max(x, y)),
    ATOMIC("max.u64", uint64_t, std::max(x, y)),
    ATOMIC("max.s64", int64_t, std::max(x, y)),
    ATOMIC("and.b32", uint32_t, x& y),
    ATOMIC("or.b32", uint32_t, x | y),
    ATOMIC("xor.b32", uint32_t, x ^ y),
    ATOMIC("and.b64", uint64_t, x& y),
    ATOMIC("or.b64", uint64_t, x | y),
    ATOMIC("xor.b64", uint64_t, x ^ y),
    ATOM("exch.b32", uint32_t, y),
    ATOM("exch.b64", uint64_t, y),
    ATOM("cas.b32", uint32_t, x == y ? z : x),
    ATOM("cas.b64", uint64_t, x == y ? z : x),
    ATOM("cas.b16", uint16_t, x == y ? z : x),
    ATOMIC("inc.u32", uint32_t, x >= y ? 0 : x + 1),
    ATOMIC("dec.u32", uint32_t, x == 0 || x > y ? y : x - 1),
    {"cp.async", "*", copy_async, Flow::none},
    {"cp.async.commit_group", "=", commit, Flow::none},
    {"cp.async.wait_group", "=i", [](Warp& w, const Instruction& in, Mask) { wait_for(w, size_t(in.with[0])); },
     Flow::none},
    {"cp.async.wait_all", "=",
     [](Warp& w, const Instruction& in, Mask m) {
       commit(w, in, m);
       wait_for(w, 0);
     },
     Flow::none},
    {"fence", "=", [](Warp& w, const Instruction&, Mask) { fence(w); }, Flow::none},
    {"fence.cta", "=", [](Warp&, const Instruction&, Mask) {}, Flow::none},
    // addresses of shared memory in the generic space and back
    {"cvta.shared", "64=64",
     [](Warp& w, const Instruction& in, Mask m) {
       const uint64_t* x = w.at<uint64_t>(in.at[1]);
       each(w.at<uint64_t>(in.at[0]), m, [&](int i) { return x[i] + SHARED_WINDOW; });
     },
     Flow::none},
    {"cvta.to.shared", "64=64",
     [](Warp& w, const Instruction& in, Mask m) {
       const uint64_t* x = w.at<uint64_t>(in.at[1]);
       each(w.at<uint64_t>(in.at[0]), m, [&](int i) { return x[i] - SHARED_WINDOW; });
     },
     Flow::none},
    {"cvta.to.local", "64=64",
     [](Warp& w, const Instruction& in, Mask m) {
       const uint64_t* x = w.at<uint64_t>(in.at[1]);
       each(w.at<uint64_t>(in.at[0]), m, [&](int i) { return x[i] - LOCAL_WINDOW; });
     },
     Flow::none},
    {"mapa.b32", "32=32,32", mapa<uint32_t>, Flow::none},
    {"mapa.b64", "64=64,32", mapa<uint64_t>, Flow::none},
    // whether a generic address lies there: the immediate is the space
    {"isspacep", "p=64,i",
     [](Warp& w, const Instruction& in, Mask m) {
       Mask found = 0;
       for (int i = 0; i < LANES; i++) {
         uint64_t address = w.at<uint64_t>(in.at[1])[i];
         found |= Mask(resolve(GENERIC, address) == in.with[0]) << i;
       }
       Mask& p = *w.at<Mask>(in.at[0]);
       p = (p & ~m) | (found & m);
     },
     Flow::none},
    {"cvta.local", "64=64",
     [](Warp& w, const Instruction& in, Mask m) {
       const uint64_t* x = w.at<uint64_t>(in.at[1]);
       each(w.at<uint64_t>(in.at[0]), m, [&](int i) { return x[i] + LOCAL_WINDOW; });
     },
     Flow::none},
};

}  // namespace

}  // namespace lk::ptx
