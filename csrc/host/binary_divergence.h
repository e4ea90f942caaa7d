// From the tensors of a binary_divergence op to the canonical problem: the elements of a sigmoid_bce problem without
// weights, and a formula.
#pragma once

#include <tuple>

#include "sigmoid_bce.h"

namespace torchce::host {

namespace binary_divergence {

using namespace torchce::binary_divergence;

// The tensors of a divergence, in the schemas' order.
struct Inputs {
  Tensor input;
  std::optional<Tensor> target;

  static constexpr std::tuple kFields{&Inputs::input, &Inputs::target};
};

// Checks what a sigmoid_bce problem does not; without a target the input takes its place.
inline sigmoid_bce::Inputs elements_of(const Inputs& inputs) {
  if (inputs.target) float_dtype_of(*inputs.target, "target");
  return {inputs.input, inputs.target.value_or(inputs.input), std::nullopt, std::nullopt};
}

inline Formula formula_of(const Inputs& inputs, const Options& options) {
  if (!inputs.target) return Formula::entropy;
  return options.target_logits ? Formula::of_logits : Formula::of_probability;
}

struct ForwardCall {
  Formula formula;
  sigmoid_bce::ForwardCall elements;
};

inline ForwardCall prepare_forward(const Inputs& inputs, std::optional<ScalarType> dtype, const Options& options) {
  return {formula_of(inputs, options), sigmoid_bce::prepare_forward(elements_of(inputs), dtype, {options.reduction})};
}

struct BackwardCall {
  Formula formula;
  sigmoid_bce::BackwardCall elements;
};

inline BackwardCall prepare_backward(GradientOf of, Tensor grad_output, const Inputs& inputs, const Options& options) {
  check(of == GradientOf::logits || inputs.target, "target: expected one, whose gradient is asked for");
  return {formula_of(inputs, options),
          sigmoid_bce::prepare_backward(of, /*in_place=*/false, grad_output, elements_of(inputs), {options.reduction})};
}

}  // namespace binary_divergence
}  // namespace torchce::host
