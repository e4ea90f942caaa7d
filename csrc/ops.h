// Every op once, over a backend: checked and allocated on the host, then run by the backend.
//
// A backend has a Scope, made of the logits and held for as long as an op runs, and run(scope, call) for each kind of
// call that csrc/host prepares. schemas.h says what the arguments are.
#pragma once

#include "host/binary_divergence.h"
#include "host/boxing.h"
#include "host/divergence.h"
#include "host/sigmoid_bce.h"
#include "host/softmax_ce.h"

namespace torchce {

template <class Backend>
struct SoftmaxCE {
  using Tensor = host::Tensor;
  using DType = std::optional<host::ScalarType>;
  using Inputs = host::softmax_ce::Inputs;
  using ScaledInputs = host::softmax_ce::ScaledInputs;
  using Saved = host::softmax_ce::Saved;
  using Gradients = host::softmax_ce::Gradients;
  using Options = softmax_ce::Options;
  using PlainOptions = softmax_ce::PlainOptions;

  static std::tuple<Tensor, Tensor, Tensor> forward(Inputs inputs, DType dtype, PlainOptions options) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call = host::softmax_ce::prepare_forward({inputs}, dtype, options, /*is_general=*/false);
    Backend::run(scope, call);
    return {call.loss, call.saved.statistics, call.saved.totals};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_outputs(ScaledInputs inputs, DType dtype,
                                                                                    host::softmax_ce::Wanted wanted,
                                                                                    Options options) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call = host::softmax_ce::prepare_forward_outputs(inputs, dtype, wanted, options);
    Backend::run(scope, call);
    const auto& [lse, predictions, entropy] = *call.outputs;
    return {call.loss, lse, predictions, entropy, call.saved.statistics, call.saved.totals};
  }

  template <bool in_place>
  static Tensor backward(Tensor grad_output, Inputs inputs, Saved saved, PlainOptions options) {
    return backward_of(GradientOf::logits, in_place, {grad_output}, {inputs}, saved, options, /*is_general=*/false);
  }

  template <GradientOf of, bool in_place>
  static Tensor backward_outputs(Gradients gradients, ScaledInputs inputs, Saved saved, Options options) {
    return backward_of(of, in_place, gradients, inputs, saved, options, /*is_general=*/true);
  }

  static Tensor backward_target(Tensor grad_output, ScaledInputs inputs, Saved saved, Options options) {
    const bool is_general = options.transforms() || inputs.scale;
    return backward_of(GradientOf::target, /*in_place=*/false, {grad_output}, inputs, saved, options, is_general);
  }

  static Tensor forward_backward(Tensor grad_output, Inputs inputs, DType dtype, Options options) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call = host::softmax_ce::prepare_forward_backward(grad_output, inputs, dtype, options);
    Backend::run(scope, call);
    return call.forward.loss;
  }

 private:
  static Tensor backward_of(GradientOf of, bool in_place, const Gradients& gradients, const ScaledInputs& inputs,
                            const Saved& saved, const Options& options, bool is_general) {
    const typename Backend::Scope scope(inputs.logits);
    const auto call = host::softmax_ce::prepare_backward(of, in_place, gradients, inputs, saved, options, is_general);
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

template <class Backend>
struct Divergence {
  using Tensor = host::Tensor;
  using DType = std::optional<host::ScalarType>;
  using Inputs = host::divergence::Inputs;
  using Saved = host::divergence::Saved;
  using Needs = host::divergence::Needs;
  using Options = divergence::Options;

  static std::tuple<Tensor, Tensor, Tensor> forward(Inputs inputs, DType dtype, Options options) {
    const typename Backend::Scope scope(inputs.input);
    const auto call = host::divergence::prepare_forward(inputs, dtype, options);
    Backend::run(scope, call);
    return {call.loss, call.saved.statistics, call.saved.totals};
  }

  static std::tuple<Tensor, Tensor> backward(Tensor grad_output, Inputs inputs, Saved saved, Needs needs,
                                             Options options) {
    const typename Backend::Scope scope(inputs.input);
    const auto call = host::divergence::prepare_backward(grad_output, inputs, saved, needs, options);
    Backend::run(scope, call);
    return {call.grad_input, call.grad_target};
  }
};

template <class Backend>
struct BinaryDivergence {
  using Tensor = host::Tensor;
  using DType = std::optional<host::ScalarType>;
  using Inputs = host::binary_divergence::Inputs;
  using Options = binary_divergence::Options;

  static Tensor forward(Inputs inputs, DType dtype, Options options) {
    const typename Backend::Scope scope(inputs.input);
    const auto call = host::binary_divergence::prepare_forward(inputs, dtype, options);
    Backend::run(scope, call);
    return call.elements.loss;
  }

  template <GradientOf of>
  static Tensor backward(Tensor grad_output, Inputs inputs, Options options) {
    const typename Backend::Scope scope(inputs.input);
    const auto call = host::binary_divergence::prepare_backward(of, grad_output, inputs, options);
    Backend::run(scope, call);
    return call.elements.grad;
  }
};

// Registers the backend's ops in a library of one dispatch key.
template <class Backend, class Library>
void implement_ops(Library& m) {
  using CE = SoftmaxCE<Backend>;
  using BCE = SigmoidBCE<Backend>;
  using Binary = BinaryDivergence<Backend>;
  using host::box, host::box_without_result;
  m.impl("softmax_ce_forward", &box<&CE::forward>);
  m.impl("softmax_ce_forward_outputs", &box<&CE::forward_outputs>);
  m.impl("softmax_ce_backward", &box<&CE::template backward<false>>);
  m.impl("softmax_ce_backward_", &box_without_result<&CE::template backward<true>>);
  m.impl("softmax_ce_backward_outputs", &box<&CE::template backward_outputs<GradientOf::logits, false>>);
  m.impl("softmax_ce_backward_outputs_", &box_without_result<&CE::template backward_outputs<GradientOf::logits, true>>);
  m.impl("softmax_ce_backward_scale", &box<&CE::template backward_outputs<GradientOf::scale, false>>);
  m.impl("softmax_ce_backward_target", &box<&CE::backward_target>);
  m.impl("softmax_ce_forward_backward_", &box<&CE::forward_backward>);
  m.impl("divergence_forward", &box<&Divergence<Backend>::forward>);
  m.impl("divergence_backward", &box<&Divergence<Backend>::backward>);
  m.impl("sigmoid_bce_forward", &box<&BCE::forward>);
  m.impl("sigmoid_bce_backward", &box<&BCE::template backward<GradientOf::logits, false>>);
  m.impl("sigmoid_bce_backward_", &box_without_result<&BCE::template backward<GradientOf::logits, true>>);
  m.impl("sigmoid_bce_backward_target", &box<&BCE::template backward<GradientOf::target, false>>);
  m.impl("binary_divergence_forward", &box<&Binary::forward>);
  m.impl("binary_divergence_backward", &box<&Binary::template backward<GradientOf::logits>>);
  m.impl("binary_divergence_backward_target", &box<&Binary::template backward<GradientOf::target>>);
}

}  // namespace torchce
