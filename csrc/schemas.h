// The op schemas: the contract between Python and every device's kernels. torchce/ops.py gives the shapes.
#pragma once

namespace torchce {

// Defines the ops in a library's namespace. reduction: 0 none, 1 mean, 2 sum.
template <class Library>
void define_ops(Library& m) {
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
      "softmax_ce_forward_backward_(Tensor grad_output, Tensor(a!) logits, Tensor target, Tensor? weight, "
      "int reduction, int ignore_index, float label_smoothing, ScalarType? dtype) -> Tensor");
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

}  // namespace torchce
