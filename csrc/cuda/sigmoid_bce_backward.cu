// The backwards of sigmoid_bce on CUDA.
#include "../host/sigmoid_bce.h"
#include "ops.h"
#include "sigmoid_bce.cuh"
#include "sigmoid_bce_launch.h"

namespace torchce::cuda {
namespace {

using namespace sigmoid_bce;
using host::sigmoid_bce::BackwardCall;

template <class T, class U, GradientOf of, Layout layout, int V>
void launch_backward(const DeviceScope& device, const Elements& problem) {
  const auto kernel = backward<T, U, of, layout, V>;
  launch(device, kernel, grid_for(device, kernel, problem.numel / V), problem);
}

template <GradientOf of>
Tensor run_backward(const DeviceScope& device, const BackwardCall& call) {
  const Elements& problem = call.problem.elements;
  if (problem.numel == 0) return call.grad;
  with_kernel(problem, [&](auto logits, auto target, auto layout, auto pack) {
    using U = decltype(target);
    if constexpr (of == GradientOf::logits || !std::is_integral_v<U>) {
      launch_backward<decltype(logits), U, of, layout(), pack()>(device, problem);
    }
  });
  return call.grad;
}

}  // namespace

Tensor sigmoid_bce_backward(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                            std::optional<Tensor> pos_weight, int64_t reduction) {
  const DeviceScope device(logits);
  return run_backward<GradientOf::logits>(
      device, host::sigmoid_bce::prepare_backward(grad_output, logits, target, weight, pos_weight, reduction, logits));
}

void sigmoid_bce_backward_(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                           std::optional<Tensor> pos_weight, int64_t reduction) {
  const DeviceScope device(logits);
  run_backward<GradientOf::logits>(
      device, host::sigmoid_bce::prepare_backward(grad_output, logits, target, weight, pos_weight, reduction, logits,
                                                  /*in_place=*/true));
}

Tensor sigmoid_bce_backward_target(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                                   std::optional<Tensor> pos_weight, int64_t reduction) {
  const DeviceScope device(logits);
  return run_backward<GradientOf::target>(
      device, host::sigmoid_bce::prepare_backward(grad_output, logits, target, weight, pos_weight, reduction, target));
}

}  // namespace torchce::cuda
