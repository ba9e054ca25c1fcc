// The extension module `zerokl.kernels.cpu._cpu`: bindings by kernel family, and the controls of threads and instruction set.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "dispatch.h"
#include "thread_pool.h"

namespace nb = nanobind;

namespace {

const zk::Isa ALL[] = {zk::Isa::generic, zk::Isa::avx2, zk::Isa::avx512};

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (zk::Isa isa : ALL)
    if (zk::isa_available(isa)) names.emplace_back(zk::isa_name(isa));
  return names;
}

void set_instruction_set(const std::string& name) {
  for (zk::Isa isa : ALL)
    if (name == zk::isa_name(isa) && zk::isa_available(isa)) return zk::set_isa(isa);
  throw std::invalid_argument("instruction set '" + name + "' is not available on this processor or in this build");
}

void set_num_threads(int count) {
  if (count < 1 || count > 1024) throw std::invalid_argument("num_threads must be in [1, 1024], got " + std::to_string(count));
  zk::set_num_threads(count);
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "Batch-invariant float32 kernels for CPUs (docs/numerics.md).";
  m.def("instruction_sets", &instruction_sets, "Instruction sets that this build and processor offer, slowest first.");
  m.def("instruction_set", [] { return std::string(zk::isa_name(zk::active_isa())); }, "The instruction set in use.");
  m.def("set_instruction_set", &set_instruction_set, nb::arg("name"), "Use another instruction set (for tests).");
  m.def("set_num_threads", &set_num_threads, nb::arg("count"), "Threads of the kernels, the calling one included.");
  m.def("num_threads", &zk::num_threads, "Threads of the kernels, the calling one included.");
  bind_linear(m);
  bind_elementwise(m);
  bind_attention(m);
  bind_moe(m);
  bind_sampling(m);
  bind_weights(m);
}
