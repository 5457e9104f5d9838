// Every CPU kernel of every level that this processor runs, under the sanitizer that the build has.
//   kernels           calls each with drawn operands, and compares with double sums
//   kernels --plant   plants bugs, one at a time, each of which the sanitizer must find: an operand
//                     that lacks its last element; a segment of experts that is another's; a barrier
//                     that is not there
#include <fcntl.h>
#include <sys/wait.h>

#include <exception>

#include "cases.h"
#include "openmp.h"

using namespace lk;
using namespace lk::sanitize;

namespace {

constexpr int FOUND = 77;      // exit status
bool in_planted_case = false;  // of this process

}  // namespace

// what the sanitizers' libraries ask the program for
#define LK_ASKED extern "C" __attribute__((visibility("default")))
LK_ASKED const char* __asan_default_options() { return "exitcode=77:detect_stack_use_after_return=1"; }
LK_ASKED const char* __ubsan_default_options() { return "exitcode=77:print_stacktrace=1"; }
LK_ASKED const char* __tsan_default_options() { return "exitcode=77:halt_on_error=1:history_size=7"; }
// before a report is written, which takes long and would be thrown away
LK_ASKED void __asan_on_error() {
  if (in_planted_case) _exit(FOUND);
}

namespace {

// odd ones, and ones around the sizes of the kernels' blocks
const std::vector<Shape> shapes{{1, 1, 1, 1},      {1, 64, 48, 8},    {2, 67, 50, 5},    {3, 33, 129, 16},
                                {5, 256, 96, 13},  {7, 300, 31, 33},  {16, 128, 64, 16}, {17, 130, 65, 3},
                                {35, 1100, 17, 9}, {64, 96, 101, 64}, {66, 63, 200, 32}, {130, 70, 97, 7},
                                {9, 1025, 7, 70},  {1, 2100, 260, 4}, {33, 513, 49, 20}};
// on tiles: x in the second-level cache and not, tokens in several parts
const std::vector<Shape> shapes_on_tiles{{530, 400, 40, 18}, {520, 1088, 270, 16}};

std::vector<const Kernels*> levels() {
  const Kernels* found[LEVELS];
  const int count = supported(found);
  std::vector<const Kernels*> all(found, found + count);
#if defined(LK_TILES)
  const auto runs = [&](const Kernels* level) { return std::find(all.begin(), all.end(), level) != all.end(); };
  for (const Kernels* level : {&avx512bf16::kernels, &amx::kernels}) {
    if (runs(&avx512::kernels) && !runs(level)) all.push_back(level);
  }
#endif
  return all;
}

// of the levels with products of bf16 only what is their own
bool has(const Kernels* level, const KernelCase& kernel, int type) {
  const std::string name = level->level;
  if (kernel.experts) return level->tiles ? DType(type) == DType::bf16 : name != "avx2";
  if (kernel.call == tiles_case) return level->tiles != nullptr;
  return level->tiles == nullptr || (name == "avx512bf16" && std::string(kernel.name) == "forward_small");
}

Case draw(const Kernels* level, const KernelCase& kernel, size_t shape, const Shape& of, int type, int threads,
          int round) {
  uint64_t seed = shape * 64 + uint64_t(type) * 16 + uint64_t(round);
  for (const char* at = kernel.name; *at; at++) seed = seed * 31 + uint64_t(*at);
  return {level, kernel.name, of, DType(type), threads, {seed}, {}, false, kernel.codes};
}

int call_all() {
  int calls = 0;
  for (const Kernels* level : levels()) {
    for (const KernelCase& kernel : cases) {
      std::vector<Shape> all = shapes;
      if (kernel.call == tiles_case) all.insert(all.end(), shapes_on_tiles.begin(), shapes_on_tiles.end());
      for (size_t i = 0; i < all.size(); i++) {
        for (int type = 0; type < 3; type++) {
          if (!has(level, kernel, type)) continue;
          for (int round = 0; round < (kernel.experts ? 1 : 2); round++, calls++) {
            Case c = draw(level, kernel, i, all[i], type, 1 + int(i + size_t(type) + 2 * size_t(round)) % 3, round);
            kernel.call(c);
          }
        }
      }
    }
  }
  return calls;
}

// the exit status of a process of its own that runs the case; its words are not shown
int status_of(const KernelCase& kernel, Case c) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(open("/dev/null", O_WRONLY), 2);
    c.planted = in_planted_case = true;
    kernel.call(c);
    _exit(1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// bugs that were not found
int missed = 0, found = 0;
void judge(const KernelCase& kernel, Case c, const char* bug, int which) {
  // whether a race shows depends on which thread comes first
  for (int attempt = 0; attempt < 4; attempt++) {
    late = 1 - attempt % 2, c.threads = 2 + attempt / 2;
    plant.made = 0;
    if (status_of(kernel, c) != FOUND) continue;
    found++;
    return;
  }
  missed++;
  std::printf("not found: %s %d in %s\n", bug, which, c.said().c_str());
}

// whether the region is right without this barrier, for the operands of plant_all
bool needless(const Kernels* level, const KernelCase& kernel, int barrier, int met, int type, bool coins) {
  if (kernel.call == multi_lora_case) return barrier == 0 && DType(type) == DType::f32;  // x is read where it lies
  if (kernel.call != tiles_case || std::string(level->level) != "amx") return false;
  // the end of the region, or nobody computes h of the tiles before
  return barrier == met - 1 || (barrier % 3 == 0 && !coins);
}

void plant_all() {
  const Shape small{17, 131, 67, 11};
  for (const Kernels* level : levels()) {
    for (const KernelCase& kernel : cases) {
      for (int type = 0; type < 3; type++) {
        if (!has(level, kernel, type)) continue;
        for (const bool coins : {false, true}) {
          if (DType(type) == DType::f16 && coins) continue;
#if defined(LK_THREAD)
          // tokens in two parts, so that the barrier between them counts
          const bool parts = kernel.call == tiles_case && type == 0;
          Case c = draw(level, kernel, 0, parts ? shapes_on_tiles[0] : small, type, 2, 0);
#else
          Case c = draw(level, kernel, 0, small, type, 2, 0);
#endif
          c.fixed = coins;
          plant.operand = skipped = -1;
          plant.made = barriers = 0;
          Case whole = c;
          kernel.call(whole);
#if defined(LK_ADDRESS)
          const int operands = plant.made;
          for (int i = 0; i < operands; i++) {
            plant.made = 0, plant.operand = i;
            judge(kernel, c, "the short operand, or other segment,", i);
          }
#elif defined(LK_THREAD)
          const int met = kernel.codes ? 0 : barriers;  // they are those of the kernel without codes
          for (int i = 0; i < met; i++) {
            if (needless(level, kernel, i, met, type, coins)) continue;
            skipped = i;
            judge(kernel, c, "the missing barrier", i);
          }
          skipped = -1;
#endif
        }
      }
    }
  }
  plant.operand = skipped = -1;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count > 1 && std::string(arguments[1]) == "--plant") {
      plant_all();
      std::printf("%d planted bugs found, %d not\n", found, missed);
      return missed > 0 || found == 0;
    }
    const int calls = call_all();
    std::printf("%d calls, levels", calls);
    for (const Kernels* level : levels()) std::printf(" %s", level->level);
#if defined(LK_TILES)
    for (const char* all : {"avx2", "avx512", "amx"}) {
      bool ran = false;
      for (const Kernels* level : levels()) ran = ran || std::string(level->level) == all;
      if (!ran) std::printf(", not %s: this processor cannot", all);
    }
#endif
    std::printf("\n");
    return 0;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
