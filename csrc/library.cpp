// Defines the ops, registers the CPU's, and the module torchce._C.
#include <pybind11/pybind11.h>

#include "cpu/backend.h"
#include "cpu/levels.h"
#include "ops.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY(torchce, m) { torchce::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(torchce, CPU, m) { torchce::implement_ops<torchce::cpu::Backend>(m); }

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  pybind11::list levels;
  for (const char* const* name = torchce::cpu::available_levels(); *name != nullptr; ++name) levels.append(*name);
  info["torch_built"] = TORCHCE_TORCH_VERSION;
#ifdef __VERSION__
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cpp_standard"] = __cplusplus;
  info["cpu_level"] = torchce::cpu::kernels().name;
  info["cpu_levels"] = levels;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "torchce's compiled ops; importing this registers them as torch.ops.torchce.*";
  m.def("build_info", &build_info, "What was built, and the SIMD level in use.");
}
