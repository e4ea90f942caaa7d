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

  static std::tuple<Tensor, Tensor, Tensor> forward(Inputs inputs, DType dtype, Options options) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call = host::softmax_ce::prepare_forward(inputs, dtype, options);
    Backend::run(scope, call);
    return {call.loss, call.saved.statistics, call.saved.totals};
  }

  template <GradientOf of, bool in_place>
  static Tensor backward(Tensor grad_output, Inputs inputs, Saved saved, Options options) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call = host::softmax_ce::prepare_backward(of, in_place, grad_output, inputs, saved, options);
    Backend::run(scope, call);
    return call.grad;
  }

  static Tensor forward_backward(Tensor grad_output, Inputs inputs, DType dtype, Options options) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call = host::softmax_ce::prepare_forward_backward(grad_output, inputs, dtype, options);
    Backend::run(scope, call);
    return call.forward.loss;
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
  m.impl("softmax_ce_backward", &box<&CE::template backward<GradientOf::logits, false>>);
  m.impl("softmax_ce_backward_", &box_without_result<&CE::template backward<GradientOf::logits, true>>);
  m.impl("softmax_ce_backward_target", &box<&CE::template backward<GradientOf::target, false>>);
  m.impl("softmax_ce_forward_backward_", &box<&CE::forward_backward>);
  m.impl("sigmoid_bce_forward", &box<&BCE::forward>);
  m.impl("sigmoid_bce_backward", &box<&BCE::template backward<GradientOf::logits, false>>);
  m.impl("sigmoid_bce_backward_", &box_without_result<&BCE::template backward<GradientOf::logits, true>>);
  m.impl("sigmoid_bce_backward_target", &box<&BCE::template backward<GradientOf::target, false>>);
}

}  // namespace torchce
