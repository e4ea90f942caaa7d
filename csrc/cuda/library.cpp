// Registers the CUDA ops, and the module torchce._cuda.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include "../ops.h"
#include "backend.h"

STABLE_TORCH_LIBRARY_IMPL(torchce, CUDA, m) { torchce::implement_ops<torchce::cuda::Backend>(m); }

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["cuda_built"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["archs"] = TORCHCE_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "torchce's CUDA kernels; importing this registers them for CUDA tensors.";
  m.def("build_info", &build_info, "The CUDA version built with and the architectures built for.");
}
