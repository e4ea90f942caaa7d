// From the tensors of a softmax_ce op to the canonical problem: rows of logits [N, C, S].
#pragma once

#include <tuple>

#include "row_strides.h"

namespace torchce::host {

namespace softmax_ce {

using namespace torchce::softmax_ce;

// The tensors of a loss, and those that its forward saves for a backward, in the schemas' order.
struct Inputs {
  Tensor logits, target;
  std::optional<Tensor> weight;

  static constexpr std::tuple kFields{&Inputs::logits, &Inputs::target, &Inputs::weight};
};

// ScaledInputs have a scale of the logits too, which a plain loss has not.
struct ScaledInputs : Inputs {
  std::optional<Tensor> scale = std::nullopt;

  static constexpr std::tuple kFields{&ScaledInputs::logits, &ScaledInputs::target, &ScaledInputs::weight,
                                      &ScaledInputs::scale};
};

struct Saved {
  Tensor statistics, totals;

  static constexpr std::tuple kFields{&Saved::statistics, &Saved::totals};
};

// The gradients of what a forward gave: of the loss, and of the rows' lse and entropy where they have any.
struct Gradients {
  Tensor output;
  std::optional<Tensor> lse = std::nullopt, entropy = std::nullopt;

  static constexpr std::tuple kFields{&Gradients::output, &Gradients::lse, &Gradients::entropy};
};

struct Problem {
  ScaledInputs inputs;
  Sizes row_sizes;  // the logits' without the classes
  Rows rows;

  int64_t count() const { return rows.outer * rows.inner; }
  bool probabilities() const { return is_floating(rows.target_dtype); }
  ScalarType number_type() const { return accumulation_type(rows.accumulation); }  // of all but loss and gradients
  Sizes loss_sizes() const { return rows.options.reduction == Reduction::none ? row_sizes : Sizes{}; }
  int64_t statistics_of_row(bool with_entropy) const { return 2 + probabilities() + with_entropy; }
};

// `is_general`: of Rows.
inline Problem make_problem(const ScaledInputs& inputs, const Options& options, bool is_general) {
  Problem p{inputs, {}, {}};
  const Tensor &logits = inputs.logits, &target = inputs.target;
  const auto& weight = inputs.weight;
  const auto& scale = inputs.scale;
  const Sizes sizes = sizes_of(logits);
  Rows& rows = p.rows;
  static_cast<RowShape&>(rows) = row_shape(sizes, "logits", p.row_sizes);
  rows.dtype = float_dtype_of(logits, "logits");
  rows.target_dtype = dtype_of(target, "target");
  const Sizes& wanted = p.probabilities() ? sizes : p.row_sizes;
  check(sizes_of(target) == wanted, "target: expected shape ", wanted, " for logits of shape ", sizes, ", got ",
        sizes_of(target));
  check_same_device(target, logits, "target");
  rows.accumulation = rows.dtype == DType::float64 ? DType::float64 : DType::float32;
  if (p.probabilities()) {
    if (rows.target_dtype == DType::float64 || (weight && weight->scalar_type() == ScalarType::Double)) {
      rows.accumulation = DType::float64;
    }
    const auto name = [](const Tensor& t) { return torch::headeronly::toString(t.scalar_type()); };
    const auto is_wide = [](DType dtype) { return dtype == DType::float32 || dtype == DType::float64; };
    if (rows.accumulation == DType::float64) {
      check(is_wide(rows.dtype) && is_wide(rows.target_dtype),
            "target: expected float32 or float64 beside another float64 operand, and such logits, got ", name(target),
            " for logits of ", name(logits), weight ? " and a weight of " : "", weight ? name(*weight) : "");
    } else {
      check(rows.target_dtype == rows.dtype || rows.target_dtype == DType::float32,
            "target: expected probabilities of the logits' dtype or float32, got ", name(target), " for logits of ",
            name(logits));
    }
  }
  check(options.softcap >= 0, "softcap: expected none (0) or a positive number, got ", options.softcap);
  check(options.logit_scale > 0, "logit_scale: expected a positive number, got ", options.logit_scale);
  rows.is_general = is_general;
  if (is_general && p.probabilities()) {
    const bool in_double = rows.accumulation == DType::float64;
    check(rows.target_dtype == rows.accumulation && (!in_double || rows.dtype == DType::float64),
          "target: expected float32 beside such options, or float64 for the logits too, got ",
          torch::headeronly::toString(target.scalar_type()), " for logits of ",
          torch::headeronly::toString(logits.scalar_type()));
  }
  if (weight) {
    check(
        weight->scalar_type() == p.number_type() && weight->is_contiguous() && sizes_of(*weight) == Sizes{rows.classes},
        "weight: expected a contiguous ", torch::headeronly::toString(p.number_type()), " tensor of shape [",
        rows.classes, "], got ", torch::headeronly::toString(weight->scalar_type()), " of shape ", sizes_of(*weight));
    check_same_device(*weight, logits, "weight");
  }
  if (scale) {
    check(scale->scalar_type() == p.number_type() && sizes_of(*scale).empty(), "scale: expected a ",
          torch::headeronly::toString(p.number_type()), " scalar, got ",
          torch::headeronly::toString(scale->scalar_type()), " of shape ", sizes_of(*scale));
    check_same_device(*scale, logits, "scale");
  }
  // A copy, where no strides describe the tensor, lives as long as the problem.
  rows.logits_strides = row_strides(p.inputs.logits, 1);
  rows.target_strides = row_strides(p.inputs.target, p.probabilities() ? 1 : 0);
  rows.logits = p.inputs.logits.const_data_ptr();
  rows.target = p.inputs.target.const_data_ptr();
  rows.weight = weight ? weight->const_data_ptr() : nullptr;
  rows.scale = scale ? scale->const_data_ptr() : nullptr;
  rows.options = options;
  // A lone class has the whole label, smoothed or not; without smoothing its zero gradient is exact.
  if (rows.classes == 1 && !p.probabilities()) rows.options.label_smoothing = 0;
  return p;
}

// What a forward can give of each row beside its loss, in the schema's order; without elements where it is not wanted.
struct Outputs {
  Tensor lse, predictions, entropy;
};

struct Wanted {
  bool lse, predictions, entropy;

  static constexpr std::tuple kFields{&Wanted::lse, &Wanted::predictions, &Wanted::entropy};
};

struct ForwardCall {
  Problem problem;
  Tensor loss;
  std::optional<Outputs> outputs;
  Saved saved;
  Forward args;
};

// Checks and allocates a forward op; args is complete.
inline ForwardCall prepare_forward(const ScaledInputs& inputs, std::optional<ScalarType> dtype, const Options& options,
                                   bool is_general, bool with_entropy = false) {
  Problem p = make_problem(inputs, options, is_general);
  const ScalarType loss_type = dtype.value_or(inputs.logits.scalar_type());
  Tensor loss = empty(p.loss_sizes(), loss_type, inputs.logits);
  Saved saved{empty({p.statistics_of_row(with_entropy), p.count()}, p.number_type(), inputs.logits),
              empty({2}, p.number_type(), inputs.logits)};
  Forward args{p.rows,
               loss.mutable_data_ptr(),
               dtype_of(loss_type, "dtype"),
               saved.statistics.mutable_data_ptr(),
               saved.totals.mutable_data_ptr(),
               /*lse=*/nullptr,
               /*predictions=*/nullptr,
               /*entropy=*/nullptr};
  check(is_floating(args.loss_dtype), "dtype: expected a floating dtype");
  return {std::move(p), loss, std::nullopt, saved, args};
}

// The same with outputs of the rows.
inline ForwardCall prepare_forward_outputs(const ScaledInputs& inputs, std::optional<ScalarType> dtype,
                                           const Wanted& wanted, const Options& options) {
  ForwardCall call = prepare_forward(inputs, dtype, options, /*is_general=*/true, wanted.entropy);
  const auto output = [&](ScalarType type, bool is_wanted) {
    return empty(is_wanted ? call.problem.row_sizes : Sizes{0}, type, inputs.logits);
  };
  const ScalarType number = call.problem.number_type();
  call.outputs = {output(number, wanted.lse), output(ScalarType::Long, wanted.predictions),
                  output(number, wanted.entropy)};
  auto& [lse, predictions, entropy] = *call.outputs;
  if (wanted.lse) call.args.lse = lse.mutable_data_ptr();
  if (wanted.predictions) call.args.predictions = static_cast<int64_t*>(predictions.mutable_data_ptr());
  if (wanted.entropy) call.args.entropy = entropy.mutable_data_ptr();
  call.args.rows.every_row = wanted.lse || wanted.predictions || wanted.entropy;
  return call;
}

struct BackwardCall {
  GradientOf of;
  Problem problem;
  Gradients gradients;
  Saved saved;
  Tensor grad;
  Backward args;

  bool in_place() const { return args.grad == args.rows.logits; }
};

// Checks and allocates a backward op; args is complete.
inline BackwardCall prepare_backward(GradientOf of, bool in_place, Gradients gradients, const ScaledInputs& inputs,
                                     const Saved& saved, const Options& options, bool is_general) {
  Problem p = make_problem(inputs, options, is_general);
  const Tensor& logits = inputs.logits;
  Tensor& grad_output = gradients.output;
  check(sizes_of(grad_output) == p.loss_sizes(), "grad_output: expected the loss's shape ", p.loss_sizes(), ", got ",
        sizes_of(grad_output));
  check_same_device(grad_output, logits, "grad_output");
  const auto check_saved = [&](const Tensor& t, bool has_sizes, const char* name) {
    check(has_sizes && t.scalar_type() == p.number_type() && t.is_contiguous(), name,
          ": not what the forward returned");
    check_same_device(t, logits, name);
  };
  const Sizes statistics = sizes_of(saved.statistics);
  const bool fit = statistics.size() == 2 && statistics[1] == p.count() &&
                   (statistics[0] == p.statistics_of_row(/*with_entropy=*/true) ||
                    (!gradients.entropy && statistics[0] == p.statistics_of_row(/*with_entropy=*/false)));
  check_saved(saved.statistics, fit, "statistics");
  check_saved(saved.totals, sizes_of(saved.totals) == Sizes{2}, "totals");
  check(of != GradientOf::target || p.probabilities(), "target: class indices have no gradient");
  check(of != GradientOf::scale || inputs.scale, "scale: expected one, whose gradient is asked for");

  Backward args{};
  args.grad_output_dtype = float_dtype_of(grad_output, "grad_output");
  args.grad_output_strides = row_strides(grad_output, 0);
  args.grad_output = grad_output.const_data_ptr();
  const auto describe = [&](std::optional<Tensor>& grad, const char* name, const void*& data, RowStrides& strides) {
    if (!grad) return;
    check(sizes_of(*grad) == p.row_sizes && grad->scalar_type() == p.number_type(), name, ": expected a ",
          torch::headeronly::toString(p.number_type()), " tensor of shape ", p.row_sizes, ", got ",
          torch::headeronly::toString(grad->scalar_type()), " of shape ", sizes_of(*grad));
    check_same_device(*grad, logits, name);
    strides = row_strides(*grad, 0);
    data = grad->const_data_ptr();
  };
  describe(gradients.lse, "grad_lse", args.grad_lse, args.grad_lse_strides);
  describe(gradients.entropy, "grad_entropy", args.grad_entropy, args.grad_entropy_strides);
  args.statistics = saved.statistics.const_data_ptr();
  args.totals = saved.totals.const_data_ptr();
  Tensor grad = logits;
  if (in_place) {
    check(is_dense(sizes_of(logits), strides_of(logits)), "logits: only dense memory can be overwritten");
    check(p.rows.logits == logits.const_data_ptr(), "logits: no single stride leads through the inner dimensions");
  } else if (of == GradientOf::scale) {
    grad = empty(p.row_sizes, p.number_type(), logits);
  } else {
    grad = empty_gradient(of == GradientOf::target ? inputs.target : logits);
  }
  Tensor described = grad;  // never copied: its strides merge
  args.grad_strides = row_strides(described, of == GradientOf::scale ? 0 : 1);
  args.grad = grad.mutable_data_ptr();
  args.rows = p.rows;
  return {of, std::move(p), std::move(gradients), saved, grad, args};
}

struct ForwardBackwardCall {
  ForwardCall forward;
  BackwardCall backward;
};

// Checks and allocates the op that writes the gradient over the logits in the same pass.
inline ForwardBackwardCall prepare_forward_backward(Tensor grad_output, const Inputs& inputs,
                                                    std::optional<ScalarType> dtype, const Options& options) {
  check(options.reduction != Reduction::mean,
        "reduction: a mean's divisor is known only after the last row; divide grad_output by it and ask for the sum");
  const bool is_general = !options.are_plain();
  const ForwardCall forward = prepare_forward({inputs}, dtype, options, is_general);
  return {forward, prepare_backward(GradientOf::logits, /*in_place=*/true, {grad_output}, {inputs}, forward.saved,
                                    options, is_general)};
}

}  // namespace softmax_ce
}  // namespace torchce::host
