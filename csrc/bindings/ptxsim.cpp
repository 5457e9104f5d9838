// lora_kernels._ptxsim: the PTX simulator. The text is decoded in Python
// (lora_kernels/ptxsim/decode.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "../ptxsim/block.h"
#include "../ptxsim/cache.h"

namespace py = pybind11;
using namespace lk::ptx;

namespace {

using Line = std::tuple<std::string, std::vector<int32_t>, std::vector<int64_t>, int32_t, bool, int32_t>;

const Entry& entry_of(const std::string& name) {
  for (const Entry& e : table()) {
    if (name == e.name) return e;
  }
  throw std::invalid_argument("no instruction " + name);
}

// code: (name, operands, immediates, predicate or -1, negated, line); special: where %tid.x and so
// on lie
std::unique_ptr<Program> make(const std::vector<Line>& code, const py::bytes& registers,
                              const std::map<std::string, int32_t>& special, uint32_t shared_bytes,
                              uint32_t local_bytes) {
  auto program = std::make_unique<Program>();
  const std::string image = registers;
  program->registers.assign(image.begin(), image.end());
  program->shared_bytes = shared_bytes;
  program->local_bytes = local_bytes;
  const auto place = [&](const std::string& name) {
    const auto found = special.find(name);
    return found == special.end() ? -1 : found->second;
  };
  const char* axes = "xyz";
  for (int d = 0; d < 3; d++) {
    program->tid[d] = place(std::string("%tid.") + axes[d]);
    program->ctaid[d] = place(std::string("%ctaid.") + axes[d]);
    program->nctaid[d] = place(std::string("%nctaid.") + axes[d]);
    program->ntid[d] = place(std::string("%ntid.") + axes[d]);
  }
  program->laneid = place("%laneid");
  program->warpid = place("%warpid");
  std::map<std::string, int32_t> names;
  std::vector<std::pair<size_t, size_t>> begins;
  for (const auto& [name, operands, immediates, predicate, negated, line] : code) {
    const Entry& e = entry_of(name);
    const auto [at, fresh] = names.try_emplace(name, int32_t(program->names.size()));
    if (fresh) program->names.push_back(name);
    begins.emplace_back(program->operands.size(), program->immediates.size());
    program->operands.insert(program->operands.end(), operands.begin(), operands.end());
    program->immediates.insert(program->immediates.end(), immediates.begin(), immediates.end());
    if (name == "wgmma.mma_async") program->wgmma = at->second;
    const int32_t results = results_of(e, immediates.data());
    program->code.push_back({e.run, e.flow, nullptr, nullptr, predicate, negated, results, line, at->second});
  }
  for (size_t i = 0; i < begins.size(); i++) {
    program->code[i].at = program->operands.data() + begins[i].first;
    program->code[i].with = program->immediates.data() + begins[i].second;
  }
  return program;
}

// buffers: (name, address, bytes, writable, poisoned, bytes of an element); before: (name, address,
// bytes, written)
py::dict run(const Program& program, std::array<uint32_t, 3> grid, std::array<uint32_t, 3> block,
             const py::bytes& parameters,
             const std::vector<std::tuple<std::string, uint64_t, uint64_t, bool, bool, uint32_t>>& buffers,
             const std::vector<std::tuple<std::string, uint64_t, uint64_t, bool>>& before, uint32_t dynamic_shared,
             bool check, bool late, bool shuffle, uint64_t seed, uint64_t steps, bool trace, int resident) {
  Launch launch;
  launch.program = &program;
  for (const auto& [name, address, bytes, writable, poisoned, unit] : buffers) {
    launch.buffers.push_back({name, address, address + bytes, writable, poisoned});
    launch.units.push_back(unit);
  }
  launch.shadows.resize(buffers.size());
  for (const auto& [name, address, bytes, written] : before)
    launch.before.push_back({name, address, address + bytes, written});
  const std::string held = parameters;
  launch.parameters.assign(held.begin(), held.end());
  std::copy(grid.begin(), grid.end(), launch.grid);
  std::copy(block.begin(), block.end(), launch.block);
  launch.shared_bytes = program.shared_bytes + dynamic_shared;
  launch.options = {check, late, shuffle, seed, steps, trace, resident};
  {
    py::gil_scoped_release release;
    launch.run();
  }
  const Counters& c = launch.counters;
  py::dict counters, by_opcode;
  const std::pair<const char*, uint64_t> counted[] = {{"load_sectors", c.load_sectors},
                                                      {"store_sectors", c.store_sectors},
                                                      {"load_bytes", c.load_bytes},
                                                      {"store_bytes", c.store_bytes},
                                                      {"load_requests", c.load_requests},
                                                      {"store_requests", c.store_requests},
                                                      {"shared_wavefronts", c.shared_wavefronts},
                                                      {"shared_ideal", c.shared_ideal},
                                                      {"mma", c.mma},
                                                      {"barriers", c.barriers},
                                                      {"atomics", c.atomics},
                                                      {"instructions", c.instructions},
                                                      {"blocks", c.blocks}};
  for (const auto& [name, value] : counted) counters[name] = value;
  for (size_t i = 0; i < launch.by_opcode.size(); i++) by_opcode[program.names[i].c_str()] = launch.by_opcode[i];
  py::dict result;
  py::list errors;
  for (const Finding& f : launch.findings) {
    errors.append(f.more ? f.text + " (and " + std::to_string(f.more) + " more like it)" : f.text);
  }
  result["errors"] = errors;
  result["passes_on"] = launch.passes_on;
  result["counters"] = counters;
  result["by_opcode"] = by_opcode;
  result["trace"] = py::bytes(reinterpret_cast<const char*>(launch.trace.data()), launch.trace.size() * 8);
  return result;
}

}  // namespace

PYBIND11_MODULE(_ptxsim, m) {
  py::class_<Program>(m, "Program").def(py::init(&make));
  m.def(
      "table",
      [] {
        py::dict entries;
        for (const Entry& e : table()) entries[e.name] = e.operands;
        return entries;
      },
      "The instructions: name to the widths of their operands in bits, '*' where the decoder knows the form.");
  m.def(
      "through_cache",
      [](const py::bytes& trace, uint64_t capacity, uint64_t line_bytes) {
        const std::string held = trace;
        const Traffic t = through_cache(reinterpret_cast<const uint64_t*>(held.data()), held.size() / 8, capacity,
                                        line_bytes);
        return py::make_tuple(t.read, t.written);
      },
      "Bytes read from and written to memory behind a cache.");
  m.def("run", &run, "Runs a launch; gives its errors, counters and trace.");
}
