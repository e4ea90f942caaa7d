// The op schemas, which are the contract between Python and every device's kernels, and the module torchce._C.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/levels.h"

// reduction: 0 none, 1 mean, 2 sum. torchce/ops.py gives the shapes.
STABLE_TORCH_LIBRARY(torchce, m) {
  m.def(
      "softmax_ce_forward(Tensor logits, Tensor target, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, ScalarType? dtype) -> (Tensor loss, Tensor statistics, Tensor totals)");
  m.def(
      "softmax_ce_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor statistics, "
      "Tensor totals, int reduction, int ignore_index, float label_smoothing) -> Tensor");
  m.def(
      "softmax_ce_backward_(Tensor grad_output, Tensor(a!) logits, Tensor target, Tensor? weight, Tensor statistics, "
      "Tensor totals, int reduction, int ignore_index, float label_smoothing) -> ()");
  m.def(
      "softmax_ce_backward_target(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor statistics, Tensor totals, int reduction, float label_smoothing) -> Tensor");
  m.def(
      "sigmoid_bce_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? pos_weight, int reduction, "
      "ScalarType? dtype) -> Tensor");
  m.def(
      "sigmoid_bce_backward(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, Tensor? pos_weight, "
      "int reduction) -> Tensor");
  m.def(
      "sigmoid_bce_backward_(Tensor grad_output, Tensor(a!) logits, Tensor target, Tensor? weight, "
      "Tensor? pos_weight, int reduction) -> ()");
  m.def(
      "sigmoid_bce_backward_target(Tensor grad_output, Tensor logits, Tensor target, Tensor? weight, "
      "Tensor? pos_weight, int reduction) -> Tensor");
}

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
