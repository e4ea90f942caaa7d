// Every op once, over a backend: checked and allocated on the host, then run by the backend.
//
// A backend has a Scope, made of the logits and held for as long as an op runs, and run(scope, call) for each kind of
// call that csrc/host prepares. schemas.h says what the arguments are.
#pragma once

#include "host/boxing.h"
#include "host/sigmoid_bce.h"
#include "host/softmax_ce.h"

namespace torchce {

template <class Backend>
struct SoftmaxCE {
  using Tensor = host::Tensor;
  using DType = std::optional<host::ScalarType>;
  using Inputs = host::softmax_ce::Inputs;
  using Saved = host::softmax_ce::Saved;
  using Options = softmax_ce::Options;
  using PlainOptions = softmax_ce::PlainOptions;

  static std::tuple<Tensor, Tensor, Tensor> forward(Inputs inputs, DType dtype, PlainOptions options) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call = host::softmax_ce::prepare_forward(inputs, dtype, options, /*is_general=*/false);
    Backend::run(scope, call);
    return {call.loss, call.saved.statistics, call.saved.totals};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_outputs(Inputs inputs, DType dtype,
                                                                            bool returns_lse, bool returns_predictions,
                                                                            Options options) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call =
        host::softmax_ce::prepare_forward_outputs(inputs, dtype, returns_lse, returns_predictions, options);
    Backend::run(scope, call);
    return {call.loss, call.outputs->lse, call.outputs->predictions, call.saved.statistics, call.saved.totals};
  }

  template <bool in_place>
  static Tensor backward(Tensor grad_output, Inputs inputs, Saved saved, PlainOptions options) {
    return backward_of(GradientOf::logits, in_place, grad_output, std::nullopt, inputs, saved, options, false);
  }

  template <bool in_place>
  static Tensor backward_outputs(Tensor grad_output, std::optional<Tensor> grad_lse, Inputs inputs, Saved saved,
                                 Options options) {
    return backward_of(GradientOf::logits, in_place, grad_output, grad_lse, inputs, saved, options, true);
  }

  static Tensor backward_target(Tensor grad_output, Inputs inputs, Saved saved, Options options) {
    return backward_of(GradientOf::target, /*in_place=*/false, grad_output, std::nullopt, inputs, saved, options,
                       options.transforms());
  }

  static Tensor forward_backward(Tensor grad_output, Inputs inputs, DType dtype, Options options) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call = host::softmax_ce::prepare_forward_backward(grad_output, inputs, dtype, options);
    Backend::run(scope, call);
    return call.forward.loss;
  }

 private:
  static Tensor backward_of(GradientOf of, bool in_place, const Tensor& grad_output,
                            const std::optional<Tensor>& grad_lse, const Inputs& inputs, const Saved& saved,
                            const Options& options, bool is_general) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call =
        host::softmax_ce::prepare_backward(of, in_place, grad_output, grad_lse, inputs, saved, options, is_general);
    Backend::run(scope, call);
    return call.grad;
  }
};

template <class Backend>
struct SigmoidBCE {
  using Tensor = host::Tensor;
  using DType = std::optional<host::ScalarType>;
  using Inputs = host::sigmoid_bce::Inputs;
  using Options = sigmoid_bce::Options;

  static Tensor forward(Inputs inputs, DType dtype, Options options) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call = host::sigmoid_bce::prepare_forward(inputs, dtype, options);
    Backend::run(scope, call);
    return call.loss;
  }

  template <GradientOf of, bool in_place>
  static Tensor backward(Tensor grad_output, Inputs inputs, Options options) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call = host::sigmoid_bce::prepare_backward(of, in_place, grad_output, inputs, options);
    Backend::run(scope, call);
    return call.grad;
  }
};

// Registers the backend's ops in a library of one dispatch key.
template <class Backend, class Library>
void implement_ops(Library& m) {
  using CE = SoftmaxCE<Backend>;
  using BCE = SigmoidBCE<Backend>;
  using host::box, host::box_without_result;
  m.impl("softmax_ce_forward", &box<&CE::forward>);
  m.impl("softmax_ce_forward_outputs", &box<&CE::forward_outputs>);
  m.impl("softmax_ce_backward", &box<&CE::template backward<false>>);
  m.impl("softmax_ce_backward_", &box_without_result<&CE::template backward<true>>);
  m.impl("softmax_ce_backward_outputs", &box<&CE::template backward_outputs<false>>);
  m.impl("softmax_ce_backward_outputs_", &box_without_result<&CE::template backward_outputs<true>>);
  m.impl("softmax_ce_backward_target", &box<&CE::backward_target>);
  m.impl("softmax_ce_forward_backward_", &box<&CE::forward_backward>);
  m.impl("sigmoid_bce_forward", &box<&BCE::forward>);
  m.impl("sigmoid_bce_backward", &box<&BCE::template backward<GradientOf::logits, false>>);
  m.impl("sigmoid_bce_backward_", &box_without_result<&BCE::template backward<GradientOf::logits, true>>);
  m.impl("sigmoid_bce_backward_target", &box<&BCE::template backward<GradientOf::target, false>>);
}

}  // namespace torchce
