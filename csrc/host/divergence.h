// From the tensors of a divergence op to the canonical problem: rows of two distributions.
#pragma once

#include <tuple>
#include <utility>

#include "row_strides.h"

namespace torchce::host {

namespace divergence {

using namespace torchce::divergence;

// The tensors of a divergence, in the schemas' order.
struct Inputs {
  Tensor input;
  std::optional<Tensor> target, mask;

  static constexpr std::tuple kFields{&Inputs::input, &Inputs::target, &Inputs::mask};
};

struct Saved {
  Tensor statistics, totals;

  static constexpr std::tuple kFields{&Saved::statistics, &Saved::totals};
};

// Which gradients a backward is to give.
struct Needs {
  bool input, target;

  static constexpr std::tuple kFields{&Needs::input, &Needs::target};
};

struct Problem {
  Inputs inputs;
  Sizes row_sizes;  // the input's without the classes
  Rows rows;

  int64_t count() const { return rows.outer * rows.inner; }
  ScalarType number_type() const { return accumulation_type(rows.accumulation); }
  Sizes loss_sizes() const { return rows.options.reduction == Reduction::none ? row_sizes : Sizes{}; }
  // Whether the student has the part of `first`: a KL divergence is weighted by its first distribution.
  bool input_is_first() const { return rows.options.kind == Kind::reverse_kl || rows.options.kind == Kind::entropy; }
};

inline Problem make_problem(const Inputs& inputs, const Options& options) {
  Problem p{inputs, {}, {}};
  Rows& rows = p.rows;
  rows.options = options;
  const Tensor& input = inputs.input;
  const Sizes sizes = sizes_of(input);
  static_cast<RowShape&>(rows) = row_shape(sizes, "input", p.row_sizes);
  const bool has_target = options.kind != Kind::entropy;
  check(inputs.target.has_value() == has_target, "target: expected ", has_target ? "one" : "none beside an entropy");
  check(options.temperature > 0, "temperature: expected a positive number, got ", options.temperature);
  check(options.beta >= 0 && options.beta <= 1, "beta: expected a number from 0 to 1, got ", options.beta);
  const auto operand = [&](Tensor& t, Side side, const char* name) {
    const DType dtype = float_dtype_of(t, name);
    check(sizes_of(t) == sizes, name, ": expected the input's shape ", sizes, ", got ", sizes_of(t));
    check_same_device(t, input, name);
    if (dtype == DType::float64) rows.accumulation = DType::float64;
    const RowStrides strides = row_strides(t, 1);  // of a copy, where no strides describe the tensor
    return Operand{side, t.const_data_ptr(), strides, dtype};
  };
  rows.accumulation = DType::float32;
  rows.first = operand(p.inputs.input, Side::logits, "input");
  rows.other = {Side::none, nullptr, {}, DType::float32};
  if (has_target) {
    rows.other = operand(*p.inputs.target, options.target_logits ? Side::logits : Side::probabilities, "target");
  }
  if (!p.input_is_first()) std::swap(rows.first, rows.other);
  if (p.inputs.mask) {
    Tensor& mask = *p.inputs.mask;
    check(dtype_of(mask, "mask") == DType::uint8, "mask: expected bool, got ",
          torch::headeronly::toString(mask.scalar_type()));
    check(sizes_of(mask) == p.row_sizes, "mask: expected shape ", p.row_sizes, " for an input of shape ", sizes,
          ", got ", sizes_of(mask));
    check_same_device(mask, input, "mask");
    rows.mask_strides = row_strides(mask, 0);
    rows.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  }
  return p;
}

struct ForwardCall {
  Problem problem;
  Tensor loss;
  Saved saved;
  Forward args;
};

// Checks and allocates a forward op; args is complete.
inline ForwardCall prepare_forward(const Inputs& inputs, std::optional<ScalarType> dtype, const Options& options) {
  Problem p = make_problem(inputs, options);
  const ScalarType loss_type = dtype.value_or(inputs.input.scalar_type());
  const DType loss_dtype = dtype_of(loss_type, "dtype");
  check(is_floating(loss_dtype), "dtype: expected a floating dtype");
  Tensor loss = empty(p.loss_sizes(), loss_type, inputs.input);
  Saved saved{empty({statistics_of(p.rows), p.count()}, p.number_type(), inputs.input),
              empty({1}, p.number_type(), inputs.input)};
  const Forward args{p.rows, loss.mutable_data_ptr(), loss_dtype, saved.statistics.mutable_data_ptr(),
                     saved.totals.mutable_data_ptr()};
  return {std::move(p), loss, saved, args};
}

struct BackwardCall {
  Problem problem;
  Tensor grad_output;  // whose memory the args point to, as they do to a copy of it
  Saved saved;
  Tensor grad_input, grad_target;
  Backward args;

  const Tensor& first() const { return problem.input_is_first() ? grad_input : grad_target; }
  const Tensor& other() const { return problem.input_is_first() ? grad_target : grad_input; }
};

// Checks and allocates a backward op; args is complete.
inline BackwardCall prepare_backward(Tensor grad_output, const Inputs& inputs, const Saved& saved, Needs needs,
                                     const Options& options) {
  Problem p = make_problem(inputs, options);
  check(sizes_of(grad_output) == p.loss_sizes(), "grad_output: expected the loss's shape ", p.loss_sizes(), ", got ",
        sizes_of(grad_output));
  check_same_device(grad_output, inputs.input, "grad_output");
  const auto check_saved = [&](const Tensor& t, const Sizes& sizes, const char* name) {
    check(sizes_of(t) == sizes && t.scalar_type() == p.number_type() && t.is_contiguous(), name,
          ": not what the forward returned");
    check_same_device(t, inputs.input, name);
  };
  check_saved(saved.statistics, {statistics_of(p.rows), p.count()}, "statistics");
  check_saved(saved.totals, {1}, "totals");
  check(!needs.target || inputs.target, "target: expected one, whose gradient is asked for");
  Backward args{};
  args.rows = p.rows;
  args.grad_output_dtype = float_dtype_of(grad_output, "grad_output");
  args.grad_output_strides = row_strides(grad_output, 0);
  args.grad_output = grad_output.const_data_ptr();
  args.statistics = saved.statistics.const_data_ptr();
  args.totals = saved.totals.const_data_ptr();
  const auto allocate = [&](bool is_needed, const Tensor& like, Gradient& gradient) {
    if (!is_needed) return empty({0}, like.scalar_type(), like);
    Tensor grad = empty_gradient(like), described = grad;  // never copied: its strides merge
    gradient = {grad.mutable_data_ptr(), row_strides(described, 1)};
    return grad;
  };
  Gradient of_input{}, of_target{};
  Tensor grad_input = allocate(needs.input, inputs.input, of_input);
  Tensor grad_target = allocate(needs.target, inputs.target.value_or(inputs.input), of_target);
  args.first = p.input_is_first() ? of_input : of_target;
  args.other = p.input_is_first() ? of_target : of_input;
  return {std::move(p), grad_output, saved, grad_input, grad_target, args};
}

}  // namespace divergence
}  // namespace torchce::host
