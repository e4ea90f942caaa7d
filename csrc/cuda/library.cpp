// Registers the CUDA ops, and the module torchce._cuda.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(torchce, CUDA, m) {
  using namespace torchce::cuda;
  m.impl("softmax_ce_forward", TORCH_BOX(&softmax_ce_forward));
  m.impl("softmax_ce_backward", TORCH_BOX(&softmax_ce_backward));
  m.impl("softmax_ce_backward_", TORCH_BOX(&softmax_ce_backward_));
  m.impl("softmax_ce_backward_target", TORCH_BOX(&softmax_ce_backward_target));
  m.impl("sigmoid_bce_forward", TORCH_BOX(&sigmoid_bce_forward));
  m.impl("sigmoid_bce_backward", TORCH_BOX(&sigmoid_bce_backward));
  m.impl("sigmoid_bce_backward_", TORCH_BOX(&sigmoid_bce_backward_));
  m.impl("sigmoid_bce_backward_target", TORCH_BOX(&sigmoid_bce_backward_target));
}

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
