// From the tensors of a sigmoid_bce op to the canonical problem: elements with merged dimensions and broadcast strides.
#pragma once

#include <algorithm>
#include <tuple>

#include "tensor.h"

namespace torchce::host {

namespace sigmoid_bce {

using namespace torchce::sigmoid_bce;

// The tensors of a loss, in the schemas' order.
struct Inputs {
  Tensor logits, target;
  std::optional<Tensor> weight, pos_weight;

  static constexpr std::tuple kFields{&Inputs::logits, &Inputs::target, &Inputs::weight, &Inputs::pos_weight};
};

struct Problem {
  Inputs inputs;
  std::optional<Tensor> grad_output;
  Elements elements;
};

// Strides of `t` over `sizes`, 0 where it is broadcast.
inline Sizes broadcast_strides(const Tensor& t, const Sizes& sizes, const char* name) {
  const Sizes own = sizes_of(t), strides = strides_of(t);
  check(own.size() <= sizes.size(), name, ": shape ", own, " does not broadcast to ", sizes);
  Sizes result(sizes.size(), 0);
  for (size_t i = 0; i < own.size(); ++i) {
    const size_t d = sizes.size() - own.size() + i;
    check(own[i] == sizes[d] || own[i] == 1, name, ": shape ", own, " does not broadcast to ", sizes);
    if (own[i] != 1) result[d] = strides[i];
  }
  return result;
}

// The merged dimensions of all operands: ordered by the logits' strides, so that memory is walked forward, and joined
// wherever every operand steps evenly from one into the next.
inline void merge_dimensions(const Sizes& sizes, const Sizes (&strides)[kOperands], Elements& e) {
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return strides[kOutput][a] > strides[kOutput][b]; });
  e.dims = 0;
  for (const size_t d : order) {
    bool joins = e.dims > 0;
    for (int o = 0; joins && o < kOperands; ++o) joins = e.strides[o][e.dims - 1] == strides[o][d] * sizes[d];
    if (joins) {
      e.sizes[e.dims - 1] *= sizes[d];
    } else {
      check(e.dims < kMaxDims, "logits: more than ", kMaxDims, " dimensions that cannot be merged");
      e.sizes[e.dims++] = sizes[d];
    }
    for (int o = 0; o < kOperands; ++o) e.strides[o][e.dims - 1] = strides[o][d];
  }
  if (e.dims == 0) {  // one element
    e.dims = 1;
    e.sizes[0] = 1;
    for (int o = 0; o < kOperands; ++o) e.strides[o][0] = 1;
  }
}

// `output` is what the op writes with the logits' shape (unreduced loss or gradient), or null where it only reduces.
inline Problem make_problem(const Inputs& inputs, std::optional<Tensor> grad_output, const Tensor* output,
                            const Options& options) {
  Problem p{inputs, grad_output, {}};
  const auto& [logits, target, weight, pos_weight] = inputs;
  Elements& e = p.elements;
  const Sizes sizes = sizes_of(logits);
  e.options = options;
  e.numel = logits.numel();
  check(sizes_of(target) == sizes, "target: expected the logits' shape ", sizes, ", got ", sizes_of(target));
  Sizes strides[kOperands];
  for (Sizes& s : strides) s.assign(sizes.size(), 0);

  const auto add = [&](Operand operand, const Tensor& t, const char* name, DType dtype) {
    check_same_device(t, logits, name);
    e.data[operand] = t.const_data_ptr();
    e.dtypes[operand] = dtype;
    strides[operand] = broadcast_strides(t, sizes, name);
  };
  const DType dtype = float_dtype_of(logits, "logits");
  const DType target_dtype = dtype_of(target, "target");
  check(target_dtype == dtype || target_dtype == DType::float32 || target_dtype == DType::uint8 ||
            target_dtype == DType::int64,
        "target: expected the logits' dtype, float32, uint8, bool or int64, got ",
        torch::headeronly::toString(target.scalar_type()));
  add(kLogits, logits, "logits", dtype);
  add(kTarget, target, "target", target_dtype);
  const auto add_weight = [&](Operand operand, const std::optional<Tensor>& w, const char* name) {
    if (!w) return;
    check(w->scalar_type() == accumulation_type(dtype), name, ": expected dtype ",
          torch::headeronly::toString(accumulation_type(dtype)), ", got ",
          torch::headeronly::toString(w->scalar_type()));
    add(operand, *w, name, dtype_of(*w, name));
  };
  add_weight(kWeight, weight, "weight");
  add_weight(kPosWeight, pos_weight, "pos_weight");
  if (grad_output) {
    const Sizes loss_sizes = options.reduction == Reduction::none ? sizes : Sizes{};
    check(sizes_of(*grad_output) == loss_sizes, "grad_output: expected the loss's shape ", loss_sizes, ", got ",
          sizes_of(*grad_output));
    add(kGradOutput, *grad_output, "grad_output", float_dtype_of(*grad_output, "grad_output"));
  }
  if (output != nullptr) {
    add(kOutput, *output, "output", float_dtype_of(*output, "output"));
    e.output = output->mutable_data_ptr();
  } else {
    strides[kOutput] = strides[kLogits];  // only to order the dimensions
  }
  if (e.numel > 0) merge_dimensions(sizes, strides, e);
  return p;
}

struct ForwardCall {
  Problem problem;
  Tensor loss;
};

// Checks and allocates a forward op.
inline ForwardCall prepare_forward(const Inputs& inputs, std::optional<ScalarType> dtype, const Options& options) {
  const ScalarType loss_type = dtype.value_or(inputs.logits.scalar_type());
  check(is_floating(dtype_of(loss_type, "dtype")), "dtype: expected a floating dtype");
  const bool unreduced = options.reduction == Reduction::none;
  Tensor loss = unreduced ? empty_like(inputs.logits, loss_type) : empty({}, loss_type, inputs.logits);
  Problem p = make_problem(inputs, std::nullopt, unreduced ? &loss : nullptr, options);
  p.elements.dtypes[kOutput] = dtype_of(loss_type, "dtype");
  p.elements.output = loss.mutable_data_ptr();
  return {std::move(p), loss};
}

struct BackwardCall {
  GradientOf of;
  Problem problem;
  Tensor grad;

  bool in_place() const { return problem.elements.output == problem.elements.data[kLogits]; }
};

// Checks and allocates a backward op.
inline BackwardCall prepare_backward(GradientOf of, bool in_place, Tensor grad_output, const Inputs& inputs,
                                     const Options& options) {
  const Tensor& logits = inputs.logits;
  check(!in_place || is_dense(sizes_of(logits), strides_of(logits)), "logits: only dense memory can be overwritten");
  const Tensor& written = of == GradientOf::target ? inputs.target : logits;
  Tensor grad = in_place ? logits : empty_like(written, written.scalar_type());
  Problem p = make_problem(inputs, grad_output, &grad, options);
  return {of, std::move(p), grad};
}

}  // namespace sigmoid_bce
}  // namespace torchce::host
